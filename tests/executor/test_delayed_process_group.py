import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import plait
from plait.cost.clusters import Link
from plait.cost.collectives import Collective, collective_s
from plait.cost.timeline import Stream, Timeline
from plait.errors import PlanError
from plait.executor.delayed_process_group import (
    DelayedProcessGroup,
    communication_events,
    delayed_groups,
    register_delayed_backend,
    registered,
)

OPERATORS = torch.ops._c10d_functional
SLOW = Link(latency_s=0.1, bandwidth_bytes_per_s=1e9)
QUICK = Link(latency_s=1e-3, bandwidth_bytes_per_s=1e9)
FREE = Link(latency_s=0.0, bandwidth_bytes_per_s=1e30)


def compute_for(seconds):
    """Multiply matrices for at least so long; returns how long it was."""
    began_s = time.perf_counter()
    x = torch.full((128, 128), 1 / 128)
    while time.perf_counter() - began_s < seconds:
        x = x @ x
    return time.perf_counter() - began_s


def waited_s(transfer):
    return sum(end - start for start, end in transfer.waits)


def test_a_collective_is_hidden_behind_computation_that_lasts_longer():
    with delayed_groups({"tp": 2}, SLOW) as groups:
        y = OPERATORS.all_reduce(torch.ones(4), "sum", "tp")
        compute_for(1.5 * SLOW.latency_s)
        OPERATORS.wait_tensor(y)
    (transfer,) = groups["tp"].transfers
    assert waited_s(transfer) < 0.2 * SLOW.latency_s


def test_waiting_at_once_costs_the_whole_delay_and_no_core():
    with delayed_groups({"tp": 2}, SLOW) as groups:
        core_s = time.thread_time()
        OPERATORS.wait_tensor(OPERATORS.all_reduce(torch.ones(4), "sum", "tp"))
        core_s = time.thread_time() - core_s
    (transfer,) = groups["tp"].transfers
    assert waited_s(transfer) >= 0.9 * SLOW.latency_s
    assert core_s < 0.3 * SLOW.latency_s


def test_computing_for_a_part_of_the_delay_leaves_the_rest_to_wait():
    with delayed_groups({"tp": 2}, SLOW) as groups:
        y = OPERATORS.all_reduce(torch.ones(4), "sum", "tp")
        computed_s = compute_for(0.5 * SLOW.latency_s)
        OPERATORS.wait_tensor(y)
    (transfer,) = groups["tp"].transfers
    # Never before it is due; and both together cost less than one after the other.
    assert transfer.waits[0][1] >= transfer.end_s
    assert waited_s(transfer) <= SLOW.latency_s - 0.9 * computed_s + 0.02


def test_the_host_wakes_soon_after_it_is_due():
    late_s = []
    with delayed_groups({"tp": 2}, QUICK) as groups:
        for _ in range(50):
            OPERATORS.wait_tensor(OPERATORS.all_reduce(torch.ones(4), "sum", "tp"))
    late_s = sorted(each.waits[0][1] - each.end_s for each in groups["tp"].transfers)
    assert late_s[0] >= 0
    assert late_s[len(late_s) // 4] < 0.5e-3


def test_collectives_of_a_group_run_one_after_another():
    with delayed_groups({"tp": 4, "dp": 4}, QUICK) as groups:
        results = [OPERATORS.all_reduce(torch.ones(1000), "sum", "tp") for _ in range(3)]
        beside = OPERATORS.all_reduce(torch.ones(1000), "sum", "dp")
        OPERATORS.wait_tensor(results[2])  # the last one first: the link is busy until then
        for each in (*results[:2], beside):
            OPERATORS.wait_tensor(each)
    duration_s = collective_s(Collective.ALL_REDUCE, 4000, 4, QUICK)
    transfers = groups["tp"].transfers
    for before, after in itertools.pairwise(transfers):
        assert after.start_s == before.end_s
    for each in transfers:
        assert each.end_s - each.start_s == pytest.approx(duration_s)
        assert each.sent_bytes == 2 * 3 / 4 * 4000
    (other,) = groups["dp"].transfers
    assert other.start_s == other.issue_s < transfers[-1].start_s


def test_after_a_pause_the_link_starts_at_once():
    with delayed_groups({"tp": 2}, QUICK) as groups:
        for _ in range(2):
            OPERATORS.wait_tensor(OPERATORS.all_reduce(torch.ones(4), "sum", "tp"))
    second = groups["tp"].transfers[1]
    assert second.start_s == second.issue_s


def test_with_scale_0_communication_is_free():
    with delayed_groups({"tp": 2}, SLOW, scale=0.0) as groups:
        began_s = time.perf_counter()
        for _ in range(5):
            OPERATORS.wait_tensor(OPERATORS.all_reduce(torch.ones(4), "sum", "tp"))
        assert time.perf_counter() - began_s < SLOW.latency_s
        groups["tp"].scale = 0.5
        OPERATORS.wait_tensor(OPERATORS.all_reduce(torch.ones(4), "sum", "tp"))
    *free, half = groups["tp"].transfers
    assert all(each.end_s == each.issue_s for each in free)
    assert half.end_s - half.start_s == pytest.approx(SLOW.latency_s / 2, rel=1e-6)


def test_outputs_have_the_shape_and_data_that_are_promised():
    x = torch.arange(24.0).reshape(6, 4)
    with delayed_groups({"tp": 3}, FREE):

        def run(operator, *arguments):
            return OPERATORS.wait_tensor(operator(x, *arguments, "tp"))

        assert torch.equal(run(OPERATORS.all_reduce, "sum"), x)
        assert torch.equal(run(OPERATORS.all_gather_into_tensor, 3), torch.cat([x, x, x]))
        assert torch.equal(run(OPERATORS.reduce_scatter_tensor, "sum", 3), x[:2])
        assert torch.equal(run(OPERATORS.all_to_all_single, [2] * 3, [2] * 3), x)
        grown = run(OPERATORS.all_to_all_single, [3] * 3, [2] * 3)
        assert torch.equal(grown, torch.cat([x, torch.zeros(3, 4)]))
        both = OPERATORS.all_gather_into_tensor_coalesced([x, 2 * x], 3, "tp")
        assert [OPERATORS.wait_tensor(each).shape for each in both] == [(18, 4)] * 2
    with registered({"tp": DelayedProcessGroup(2, 3, FREE)}):
        assert torch.equal(run(OPERATORS.reduce_scatter_tensor, "sum", 3), x[4:])


def test_data_arrive_when_the_host_waits_and_not_before():
    shard = torch.ones(4)
    with delayed_groups({"tp": 2}, FREE):
        gathered = OPERATORS.all_gather_into_tensor(shard, 2, "tp")
        shard.fill_(7)  # too early: a program that does so is wrong, and must be seen to be
        assert torch.equal(OPERATORS.wait_tensor(gathered), torch.full((8,), 7.0))


def test_a_group_that_nobody_registered_is_an_error():
    with pytest.raises(RuntimeError, match="nowhere"):
        OPERATORS.all_reduce(torch.ones(4), "sum", "nowhere")
    with delayed_groups({"tp": 2}, FREE):
        pass
    with pytest.raises(RuntimeError, match="tp"):
        OPERATORS.all_reduce(torch.ones(4), "sum", "tp")


def test_a_group_steps_aside_and_is_back_afterwards():
    outer = DelayedProcessGroup(0, 2, FREE)
    with registered({"tp": outer}):
        with delayed_groups({"tp": 4}, FREE) as groups:
            OPERATORS.wait_tensor(OPERATORS.all_reduce(torch.ones(4), "sum", "tp"))
        assert (len(groups["tp"].transfers), len(outer.transfers)) == (1, 0)
        OPERATORS.wait_tensor(OPERATORS.all_reduce(torch.ones(4), "sum", "tp"))
        assert len(outer.transfers) == 1


def test_impossible_groups_are_refused():
    with pytest.raises(PlanError, match="2 ranks has no rank 2"):
        DelayedProcessGroup(2, 2, FREE)
    with pytest.raises(PlanError, match="rank 0 of 2 cannot wrap rank 0 of 3"):
        DelayedProcessGroup(0, 2, FREE, inner=DelayedProcessGroup(0, 3, FREE))


class Reduced(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return OPERATORS.wait_tensor(OPERATORS.all_reduce(self.linear(x), "sum", "tp")).relu()


def test_a_captured_graph_that_names_the_group_runs():
    torch.manual_seed(0)
    model, x = Reduced(), torch.randn(4, 8)
    with delayed_groups({"tp": 4}, QUICK) as groups, torch.no_grad():
        schedule = plait.compile(plait.capture(model, x))
        assert groups["tp"].transfers == []  # capture communicates nothing
        assert torch.equal(plait.run(schedule, model, x), model(x))
        assert len(groups["tp"].transfers) == 2


def test_meshes_of_many_ranks_use_the_backend_in_one_process():
    register_delayed_backend(QUICK)
    dist.init_process_group("delayed", rank=0, world_size=8, store=dist.HashStore())
    try:
        mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
        group = mesh["tp"].get_group()
        assert isinstance(group, DelayedProcessGroup)
        assert (group.size(), group.rank()) == (4, 0)
        x = OPERATORS.all_gather_into_tensor(torch.ones(2, 3), 4, group.group_name)
        assert OPERATORS.wait_tensor(x).shape == (8, 3)
        assert len(group.transfers) == 1
        dist.all_reduce(torch.ones(2), group=group)
        assert len(group.transfers) == 2
    finally:
        dist.destroy_process_group()


def test_nothing_is_left_running():
    threads = threading.enumerate()
    with delayed_groups({"tp": 2}, QUICK):
        OPERATORS.wait_tensor(OPERATORS.all_reduce(torch.ones(4), "sum", "tp"))
        assert threading.enumerate() == threads  # waiting is the host's own sleep
    assert torch._C._distributed_c10d._get_work_registry_size() == 0


def test_transfers_are_events_of_the_communication_stream():
    began_s = time.perf_counter()
    with delayed_groups({"tp": 2}, QUICK) as groups:
        for _ in range(2):
            OPERATORS.wait_tensor(OPERATORS.all_reduce(torch.ones(4), "sum", "tp"))
    events = communication_events(groups["tp"].transfers, started_s=began_s, program="forward")
    timeline = Timeline(tuple(events))
    assert timeline.busy_s(Stream.COMMUNICATION) == pytest.approx(2e-3, rel=1e-3)
    assert all(event.start_s >= 0 for event in events)


@pytest.mark.multiprocess
def test_around_gloo_data_are_true_and_late(tmp_path):
    program = Path(__file__).with_name("gloo_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", program, str(rank), "2", tmp_path / "store"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    x, y = torch.arange(4.0), torch.arange(4.0) + 10
    for rank, (values, took_s) in enumerate(outputs):
        part = slice(2 * rank, 2 * rank + 2)
        assert values == [
            (x + y).tolist(),
            [*x.tolist(), *y.tolist()],
            (x + y)[part].tolist(),
            [*x[part].tolist(), *y[part].tolist()],
        ]
        assert took_s >= 4 * 0.05  # one after another
