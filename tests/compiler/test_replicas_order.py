"""A split and ordered step is deterministic: in its schedule, and in what it computes."""

import hashlib

import torch

import plait
from plait.cost.clusters import Link
from plait.executor.delayed_process_group import delayed_groups
from plait.graph.parallelize import keep_local_parameters, parallelize
from plait.graph.plan_mesh import plan_mesh
from plait.graph.storage import to_json
from tests.compiler.replica_models import Case, schedules
from tests.compiler.test_tokens import pytestmark

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
