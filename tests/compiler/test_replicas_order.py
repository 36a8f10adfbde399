"""A split and ordered step is deterministic: in its schedule, and in what it computes."""

import hashlib
from dataclasses import replace

import torch

import plait
from plait.compiler.choose_replicas import best_split
from plait.compiler.order import machine_of, order_pieces
from plait.cost import clusters
from plait.cost.clusters import Link
from plait.executor.delayed_process_group import delayed_groups
from plait.graph.parallelize import keep_local_parameters, parallelize
from plait.graph.plan_mesh import plan_mesh
from plait.graph.storage import to_json
from plait.graph.verify import verify
from tests.compiler.replica_models import Case, schedules
from tests.compiler.test_tokens import pytestmark
from tests.graph.spread_models import loss

__all__ = ["pytestmark"]
CASE = Case("our_llama", sp=True, replicas=2)
LINK = Link(latency_s=1e-4, bandwidth_bytes_per_s=1e9)


def digest(tensors):
    total = hashlib.sha256()
    for x in tensors:
        total.update(x.detach().numpy().tobytes())
    return total.hexdigest()


def test_twenty_runs_over_delayed_links_give_the_same_bits():
    split, _ = schedules(CASE)
    with plan_mesh(plait.ParallelPlan(tp=CASE.tp)) as mesh:
        model = keep_local_parameters(parallelize(CASE.model(), CASE.plan(), mesh))
    found = set()
    for _ in range(20):
        model.zero_grad()
        with delayed_groups({"tp": CASE.tp}, LINK) as groups:
            value = plait.run(split, model, CASE.tokens())
        assert groups["tp"].transfers
        found.add(digest([value, *(p.grad for p in model.parameters())]))
    assert len(found) == 1


def test_a_schedule_is_the_same_when_it_is_made_again():
    first, second = (to_json(schedules(CASE)[0]) for _ in range(2))
    assert first == second


def test_a_graph_does_not_say_which_rank_it_is_of():
    split, _ = schedules(CASE)
    steps = [step for program in split.templates.values() for step in program.steps]
    own = [step for step in steps if step.target == "plait.own_part.default"]
    assert own
    assert {step.args[3:] for step in own} == {(0, "tp")}
    assert not torch.distributed.is_initialized()


def peak_pinned_bytes(simulation):
    """What operations keep alive, each from when it could run to when it has run."""
    changes = []
    for i, each in enumerate(simulation.operations):
        ready_s = max((simulation.end_s[k] for k in each.depends_on), default=0.0)
        changes += [(ready_s, each.pinned_bytes), (simulation.end_s[i], -each.pinned_bytes)]
    now = peak = 0
    for _, change in sorted(changes, key=lambda x: (x[0], -x[1])):
        now += change
        peak = max(peak, now)
    return peak


def test_weight_gradients_that_wait_stay_within_their_byte_budget():
    case = replace(CASE, sp=False)
    graph = plait.capture(case.model(), case.tokens(), case.plan(), loss=loss)
    machine = machine_of(graph, clusters.cpu(2))
    assert machine.filler_limit_bytes == clusters.cpu(2).device.memory_bytes / 64
    split = best_split(graph, 2, machine).found.graph
    peaks = {}
    for limit in (None, 0):
        ordered, pieces = order_pieces(split, replace(machine, filler_limit_bytes=limit))
        verify(ordered)
        peaks[limit] = {
            name: peak_pinned_bytes(each.simulation)
            for name, each in pieces.items()
            if name.endswith("backward")
        }
    # With no budget each runs as soon as it can, so less is kept alive than where all come last.
    assert sum(peaks[0].values()) < sum(peaks[None].values())
