"""The rivals compute what they should, and the rows say what was measured."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks.overlap import TP, Bench, Hiding, Size
from benchmarks.overlap_rivals import HalfBatches, Placed
from plait.cost.clusters import Link
from plait.executor.delayed_process_group import DelayedProcessGroup, delayed_groups, registered
from plait.executor.overlap_forms import forms_of
from plait.executor.timed_rounds import Samples

# Dynamo makes an instance of each autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

SIZE = Size(width=512, layers=2, batch=2, tokens=64)
LINK = Link(latency_s=0.02, bandwidth_bytes_per_s=1e9)


def test_half_batches_have_the_gradients_of_the_whole_batch():
    torch.manual_seed(0)
    tokens_BT = SIZE.drawn()
    halves = HalfBatches(SIZE.config, TP, torch.float32, tokens_BT)
    model = halves.model
    # The delayed group keeps what it is to sum, so the sum is the partial itself.
    loss = model.loss(model(tokens_BT), tokens_BT) / tokens_BT.numel()
    loss.backward()
    expected = {name: x.grad.clone() for name, x in model.named_parameters()}
    with delayed_groups({"tp": TP}, LINK, scale=0.0) as groups:
        halves.step(groups["tp"])
    for name, x in model.named_parameters():
        torch.testing.assert_close(x.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_half_batches_compute_while_a_message_is_under_way():
    halves = HalfBatches(SIZE.config, TP, torch.float32, SIZE.drawn())
    slow = replace(LINK, latency_s=0.2)  # far above what a busy machine takes to compute meanwhile
    with delayed_groups({"tp": TP}, slow) as groups:
        halves.step(groups["tp"])
        transfers = groups["tp"].transfers
    assert len(transfers) == 2 * 2 * 2 * SIZE.layers  # halves, directions, attention and MLP
    # The second half's is launched before the first half's has arrived.
    assert any(b.issue_s < a.end_s for a, b in pairwise(transfers))


def test_the_placed_model_sends_what_the_captured_step_sends():
    group = DelayedProcessGroup(0, TP, LINK)
    bench = Bench(SIZE, torch.float32, group, 1)
    group.transfers.clear()
    with registered({"tp": group}):
        bench.unsplit()
    captured = sorted((each.collective, each.sent_bytes) for each in group.transfers)
    placed = Placed(SIZE.config, TP, torch.float32)
    with delayed_groups({placed.group: TP}, LINK, scale=0.0) as groups:
        placed.step(placed.loss, SIZE.drawn())
        sent = groups[placed.group].transfers
    assert sorted((each.collective, each.sent_bytes) for each in sent) == captured


def test_the_best_number_of_replicas_is_that_of_the_median():
    group = DelayedProcessGroup(0, TP, LINK)
    bench = Bench(SIZE, torch.float32, group, 1)
    forms = [
        forms_of(bench.graphs[False], number, bench.on(0.5), axis="batch") for number in (1, 2)
    ]
    seconds = {
        "unsplit": [(15, 28), (15, 28)],
        "unsplit free": [(10, 20), (10, 20)],
        "overlapped 1": [(15, 21), (15, 21)],
        "overlapped 2": [(12, 22), (13, 22)],
        "split 2 free": [(11, 21), (11, 22)],
    }
    samples = Samples(
        {
            name: [{"forward": a, "backward": b} for a, b in rounds]
            for name, rounds in seconds.items()
        }
    )
    hiding = Hiding(forms, samples)
    assert hiding.net(2, "forward") == [0.6, 0.4]
    assert (hiding.best("forward"), hiding.best("backward")) == (2, 1)
    assert hiding.best_of_step() == 2
    assert hiding.ratio("backward") == pytest.approx([0.4, 0.4])
    assert hiding.penalty(2, "backward") == pytest.approx([1.05, 1.1])
    assert hiding.penalty(1, "backward") == [1.0]
