"""Data parallel programs: the bits of one process that averages the ranks' gradients."""

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlanError
from plait.graph.storage import from_json, to_json
from plait.graph.verify_schedule import verify_schedule
from tests.rank_processes import run_ranks


@pytest.mark.multiprocess
@pytest.mark.parametrize("axis", ["fsdp", "dp"])
def test_two_ranks_have_the_bits_of_one_process_and_agree_with_fsdp2(axis, tmp_path):
    run_ranks(2, "tests.executor.data_parallel_worker", tmp_path / "store", axis)


@pytest.mark.multiprocess
def test_four_ranks_of_a_plan_with_fsdp_tp_and_replicas_train_as_one_process(tmp_path):
    run_ranks(4, "tests.executor.spread_shards_worker", tmp_path / "store")


def step_of(model, plan):
    x = torch.randn(4, 3)
    graph = plait.capture(model, x, loss=lambda model, x: model(x).square().mean())
    return plait.compile(graph, plan), x


def test_one_collective_for_each_dtype_and_none_without_an_axis():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    schedule, _ = step_of(model, plait.ParallelPlan(fsdp=2, dp=2))
    verify_schedule(schedule)
    assert from_json(to_json(schedule)) == schedule
    collectives = {
        name: [step.target for step in program.steps if "c10d" in step.target]
        for name, program in schedule.programs.items()
    }
    wait = "_c10d_functional.wait_tensor.default"
    assert collectives["unshard"] == ["_c10d_functional.all_gather_into_tensor.default", wait]
    assert collectives["reduce_gradients"] == [
        "_c10d_functional.reduce_scatter_tensor.default",
        wait,
        "_c10d_functional.all_reduce.default",
        wait,
    ]
    assert set(step_of(model, plait.ParallelPlan())[0].programs) == {"forward", "backward"}


def test_a_step_without_its_mesh_is_refused():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    schedule, x = step_of(model, plait.ParallelPlan(dp=2))
    with pytest.raises(PlanError, match=r"2 ranks on the axis 'dp', and the mesh has no named"):
        plait.run(schedule, model, x)


def test_a_parameter_without_dims_cannot_be_parted():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.scale

    with pytest.raises(PlanError, match="parameter scale has no dims: fsdp=2 cannot part it"):
        step_of(Scaled(), plait.ParallelPlan(fsdp=2))
