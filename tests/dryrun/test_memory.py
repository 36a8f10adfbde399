"""Predicted memory of real programs against what PyTorch's allocator tells its profiler.

The truth runs in a process of its own (`benchmarks.dryrun_worker`), so that nothing else allocates.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import plait
from benchmarks.dryrun_accuracy import measured
from benchmarks.dryrun_recipes import RECIPES
from benchmarks.dryrun_worker import predict
from plait.dryrun.eager import EagerProgram, trace_eager
from plait.dryrun.memory import ledger_of
from plait.dryrun.memory_trace import Kind, MemoryTrace, Storage

ROOT = Path(__file__).parents[2]
SCALARS = 2e-4  # numbers of a few bytes, which kernels wrap and a replay does not


@pytest.mark.parametrize("name", ["llama 2 micro-batches", "eager llama checkpointed"])
def test_the_peak_is_what_the_allocator_reports(name):
    [truth], predicted = measured(RECIPES[name]), predict(RECIPES[name])
    for step in ("first", "later"):
        assert predicted[step] == pytest.approx(
            truth[step], rel=1e-2 if "eager" in name else SCALARS
        )


@pytest.mark.multiprocess
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["FSDP2 llama", "GPipe llama"])
def test_a_rank_is_predicted_without_other_ranks(name):
    command = [sys.executable, "-m", "benchmarks.dryrun_worker", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    predictions = json.loads(done.stdout.splitlines()[-1])[name]
    for predicted, truth in zip(predictions, measured(RECIPES[name]), strict=True):
        assert predicted["first"] == pytest.approx(truth["first"], rel=1e-2)
        assert predicted["later"] == pytest.approx(truth["later"], rel=1e-2)


def squares(model, x):
    return model(x).square().mean()


def priced(model, x, plan=None, **settings):
    graph = plait.capture(model, x, plan or plait.ParallelPlan(), loss=squares)
    return plait.price(
        plait.compile(graph, plan, **settings), plait.clusters.cpu(plan.num_ranks if plan else 1)
    )


def test_the_ledger_of_a_linear_layer_is_its_closed_form():
    model, x = nn.Linear(1000, 500, bias=False), torch.zeros(64, 1000)
    found = priced(
        model, x, optimizer=torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    )
    weight, inputs = 4 * 1000 * 500, 4 * 64 * 1000
    assert found.memory.by_kind[Kind.PARAMETERS] == weight
    assert found.memory.by_kind[Kind.INPUTS] == inputs
    assert found.memory.by_kind[Kind.OPTIMIZER] == weight
    assert found.memory.by_kind[Kind.GRADIENTS] >= weight
    assert found.first_memory.peak_bytes == 3 * weight + inputs + 4  # the state is made; the loss
    assert sum(found.memory.by_kind.values()) == found.memory.peak_bytes
    assert found.saved_bytes == 4 * 64 * 500  # the result, of which the square's gradient is made


def test_more_micro_batches_of_the_same_size_keep_no_more_activations():
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8))
    peaks = [
        priced(model, torch.zeros(8 * n, 64), plait.ParallelPlan(num_micro_batches=n))
        for n in (2, 4, 8)
    ]
    inputs = 4 * 8 * 64
    sizes = [each.memory.peak_bytes - inputs * n for each, n in zip(peaks, (2, 4, 8), strict=True)]
    assert len(set(sizes)) == 1
    assert peaks[2].flops == 4 * peaks[0].flops
    two_s, four_s, eight_s = (each.step_s for each in peaks)
    assert eight_s - four_s == pytest.approx(2 * (four_s - two_s))


def test_what_lives_at_the_peak_is_named_with_the_users_line():
    model = nn.Sequential(nn.Linear(16, 2048), nn.Tanh(), nn.Linear(2048, 1))
    memory = priced(model, torch.zeros(512, 16)).memory
    assert memory.largest[0].num_bytes == 4 * 512 * 2048
    assert any("squares" in each.source or "linear" in each.source for each in memory.largest)
    assert memory.where


def test_an_eager_step_tells_its_kinds_apart():
    def build():
        model = nn.Linear(100, 50)
        optimizer = torch.optim.Adam(model.parameters())
        x = torch.zeros(10, 100)

        def step():
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return EagerProgram(step, model, optimizer)

    run = trace_eager(build)
    ledger = ledger_of(run.trace, first=run.begins[1], fragments=False)
    weights = 4 * (100 * 50 + 50)
    assert ledger.by_kind[Kind.PARAMETERS] == weights
    assert ledger.by_kind[Kind.OPTIMIZER] == 2 * weights + 2 * 4
    assert ledger.by_kind[Kind.GRADIENTS] == weights


def test_a_value_that_no_data_decide_is_known_to_an_eager_step():
    seen = []

    def build():
        def step():
            positions = torch.arange(8)
            seen.append(bool((positions[1:] - positions[:-1] == 1).all()))

        return EagerProgram(step)

    trace_eager(build, 1)
    assert seen == [True]


def test_the_peak_counts_what_was_there_before_and_frees_count_at_once():
    trace = MemoryTrace()
    first = trace.allocate(Storage(100, Kind.PARAMETERS, -1))
    second = trace.allocate(Storage(50, Kind.TEMPORARIES, 0))
    trace.free(second, 0)
    trace.allocate(Storage(30, Kind.GRADIENTS, 1))
    assert ledger_of(trace, fragments=False).peak_bytes == 150
    later = ledger_of(trace, first=1, fragments=False)
    assert later.by_kind == {Kind.PARAMETERS: 100, Kind.GRADIENTS: 30}
    assert trace.live_at(0) == [first]
