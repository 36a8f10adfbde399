"""The meter on a small step: what it compares, and that times are where they belong."""

import pytest
import torch

import plait
from plait.cost.clusters import Link, cpu
from plait.cost.operations import Kind
from plait.cost.timeline import Stream
from plait.errors import GraphError, PlanError
from plait.executor.delayed_process_group import delayed_groups
from plait.executor.measure_overlap import (
    LATENCY_SHARE,
    Meter,
    calibrated_cluster,
    calibrated_link,
    link_for,
    operator_samples,
    timelines,
)
from plait.executor.overlap_forms import best_forms, forms_of, prepared, unordered
from plait.executor.run import Runnable
from plait.executor.timed_rounds import (
    Samples,
    example_inputs,
    measure_rounds,
    net_hidden,
    timed_step,
    times_of,
    with_twin,
)
from plait.models.decoder import Decoder, DecoderConfig

# Dynamo makes an instance of each autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

TP = 2
SLOW = Link(latency_s=0.02, bandwidth_bytes_per_s=1e9)
CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    max_positions=256,
)


def captured(*, tp=TP, with_loss=True):
    with torch.device("meta"):
        model, tokens_BT = Decoder(CONFIG), torch.empty((1, 256), dtype=torch.int64)

    def loss(model, tokens_BT):
        return model.loss(model(tokens_BT), tokens_BT)

    plan = plait.ParallelPlan(tp=tp, replicas=2)
    return plait.capture(model, tokens_BT, plan, loss=loss if with_loss else None)


@pytest.fixture(scope="module")
def graph():
    return prepared(captured())


@pytest.fixture(scope="module")
def base(graph):
    return unordered(graph)


@pytest.fixture(scope="module")
def inputs(base):
    return example_inputs(base, vocab_size=CONFIG.vocab_size)


@pytest.fixture
def group():
    with delayed_groups({"tp": TP}, SLOW) as groups:
        yield groups["tp"]


def test_the_forms_send_the_same_bytes_and_give_the_same_gradients(graph, base, inputs, group):
    forms = forms_of(graph, 2, cpu(TP), axis="token")
    assert (forms.num_replicas, forms.axis) == (2, "token")
    group.scale = 0.0
    sent, gradients = [], []
    for schedule in (base, forms.split, forms.overlapped):
        group.transfers.clear()
        runnable = Runnable(schedule)
        found = torch.autograd.grad(runnable(*inputs), [x for x in inputs if x.requires_grad])
        sent.append([each.sent_bytes for each in group.transfers])
        gradients.append(found)
    assert len(sent[0]) == 2 * 2 * 2  # layers, directions, attention and MLP
    assert [len(each) for each in sent[1:]] == [16, 16]
    assert sum(sent[0]) == sum(sent[1]) == sum(sent[2])
    for found in gradients[1:]:
        for ours, reference in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5)


def test_nothing_is_computed_beside_a_message_in_what_is_not_ordered(graph, base):
    forms = forms_of(graph, 2, cpu(TP))
    assert computed_beside_messages(base) == computed_beside_messages(forms.split) == 0
    assert computed_beside_messages(forms.overlapped) > 0


def computed_beside_messages(schedule):
    """Products between the launch of a message and the wait for it, over all programs."""
    count = 0
    for program in (*schedule.templates.values(), *schedule.programs.values()):
        under_way = set()
        for step in program.steps:
            if step.target.startswith("_c10d_functional.wait"):
                under_way.discard(step.args[0].name)
            elif step.target.startswith("_c10d_functional."):
                under_way.add(step.name)
            elif under_way and step.target.startswith("aten.mm"):
                count += 1
    return count


def test_what_is_timed_holds_the_waiting_of_its_own_direction(base, inputs, group):
    seconds = timed_step(Runnable(base), inputs)
    assert len(group.transfers) == 8
    assert seconds["forward"] >= 4 * SLOW.latency_s
    assert seconds["backward"] >= 4 * SLOW.latency_s


def test_a_twin_is_free_and_its_program_on_the_link_that_was_given(base, inputs, group):
    runnable = Runnable(base)
    durations = {}

    def step():
        seconds = timed_step(runnable, inputs)
        durations[group.scale] = [each.end_s - each.start_s for each in group.transfers]
        return seconds

    other = Link(latency_s=0.001, bandwidth_bytes_per_s=1e12)
    samples = measure_rounds(with_twin("unsplit", step, group, other), 2)
    assert sorted(samples.by_name) == ["unsplit", "unsplit free"]
    assert [len(each) for each in samples.by_name.values()] == [2, 2]
    assert durations[0.0] == [0.0] * 8
    assert durations[1.0] == pytest.approx([0.001] * 8, rel=1e-3)


def test_figures_are_those_of_the_samples():
    seconds = {"a": [14, 15], "a free": [10, 11], "b": [15, 15], "b free": [11, 11], "c": [11, 13]}
    samples = Samples({name: [{"forward": s} for s in each] for name, each in seconds.items()})
    assert net_hidden(samples, "a", "c", "forward") == [0.75, 0.5]
    times = times_of(samples, 2, ["a", "b", "c"], "forward")
    assert (times.unsplit_s, times.overlapped_s, times.split_free_s) == (14.5, 12, 11)


def test_the_link_takes_the_asked_share_of_compute_and_has_latency(base, inputs, group):
    runnable = Runnable(base)
    link = calibrated_link(runnable, inputs, group, 0.5)
    assert group.scale == 0.0
    group.scale, group.link = 1.0, link
    group.transfers.clear()
    timed_step(runnable, inputs)
    times_s = [each.end_s - each.start_s for each in group.transfers]
    assert link.latency_s == pytest.approx(LATENCY_SHARE * sum(times_s) / len(times_s))
    assert link_for(group, 2 * sum(times_s), 0.5).latency_s == pytest.approx(link.latency_s)


def test_every_operator_that_computes_is_a_sample(base, inputs, group):
    group.scale = 0.0
    samples = operator_samples(base, inputs)
    kinds = [cost.kind for cost, _ in samples]
    assert kinds.count(Kind.ATTENTION) == 2 * CONFIG.num_layers
    layer = 7 * 3  # products: forward, and two in the backward
    loss = 2  # itself, and its weight's gradient in the backward
    assert kinds.count(Kind.MATRIX) == layer * CONFIG.num_layers + loss
    assert all(time_s > 0 for _, time_s in samples)


def test_a_timeline_shows_when_the_link_was_busy(base, inputs, group):
    found = timelines(base, inputs, group)
    assert list(found) == ["forward", "backward"]
    for timeline in found.values():
        sent = [x for x in timeline.events if x.stream is Stream.COMMUNICATION]
        assert len(sent) == 4
        assert min(x.start_s for x in timeline.events) == 0
        for message in sent:
            assert message.duration_s >= SLOW.latency_s
            # Unsplit, nothing is computed meanwhile.
            beside = [
                x
                for x in timeline.events
                if x.stream is Stream.COMPUTE
                and message.start_s < x.start_s < message.end_s - 0.001
            ]
            assert beside == []


def test_auto_never_predicts_worse_than_unsplit(graph, base, inputs, group):
    group.scale = 0.0
    cluster = calibrated_cluster(base, inputs, {"tp": SLOW}, TP)
    best = best_forms(graph, cluster)
    alone = forms_of(graph, 1, cluster)
    assert best.predicted_s <= alone.predicted_s
    tried = [note for note in best.notes if "would take" in note]
    assert [note.split()[0] for note in tried] == [f"replicas={n}" for n in (1, 2, 3, 4)]
    assert cluster.link("tp", size=TP) == SLOW


def test_what_cannot_be_measured_is_refused(graph):
    with pytest.raises(GraphError, match="nothing is communicated"):
        prepared(captured(tp=1))
    with (
        pytest.raises(GraphError, match="the step sends no message"),
        delayed_groups({"tp": TP}, SLOW) as groups,
    ):
        link_for(groups["tp"], 1.0, 0.5)
    with pytest.raises(PlanError, match="must be positive: -1"):
        Meter(name="x", vocab_size=2, ratio=-1)
    with pytest.raises(PlanError, match="at least one round"):
        Meter(name="x", vocab_size=2, num_rounds=0)
    with pytest.raises(PlanError, match="batch of 1 cannot be split"):
        forms_of(graph, 2, cpu(TP), axis="batch")
