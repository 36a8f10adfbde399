"""Merged collectives: fewer messages, and on every rank the same numbers to rounding."""

import pytest
import torch
import torch.distributed._functional_collectives as collectives
from torch import nn
from torch.distributed._local_tensor import LocalTensorMode

import plait
from plait.compiler.merge import merge
from plait.graph.distributed import name_groups
from plait.graph.plan_mesh import plan_mesh
from tests.compiler.replica_models import ranks_of

PLAN = plait.ParallelPlan(tp=2)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:While compiling, we found certain side effects:UserWarning",
)


class Sums(nn.Module):
    """Partial products, each summed over the ranks."""

    def __init__(self, combine, mesh):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()
        self.combine, self.mesh = combine, mesh

    def forward(self, x):
        return self.combine(self, self.first(x), self.second(x))

    def summed(self, x):
        return collectives.all_reduce(x, "sum", (self.mesh, 0))


def added(model, a, b):
    return model.summed(a) + model.summed(b)


def added_thrice(model, a, b):
    return model.summed(a) + model.summed(b) + model.summed(a * b)


def used_twice(model, a, b):
    one = model.summed(a)
    return one + model.summed(b), one.square()


def broadcast(model, a, b):
    return model.summed(a) + model.summed(b[:1])


def of_maxima(model, a, b):
    one, two = (collectives.all_reduce(x, "max", (model.mesh, 0)) for x in (a, b))
    return one + two


def own_half(model, a, b):
    return model.summed(a).chunk(2, 0)[0] * 2


def both_halves(model, a, b):
    left, right = model.summed(a).chunk(2, 1)
    return left * right


def captured(combine):
    """The graph as captured and merged, what it computes on each rank, and the merged graph's."""
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(4, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    with plan_mesh(PLAN) as mesh:
        model = Sums(combine, mesh).requires_grad_(False)
        graph = plait.capture(model, given[0])
        name_groups(graph, [mesh])
        merged = merge(graph)
        results = []
        with LocalTensorMode(PLAN.tp) as mode:
            x = mode.rank_map(lambda rank: given[rank])
            for each in (graph, merged):
                value = plait.run(plait.compile(each, PLAN), model, x, mesh=mesh)
                values = value if isinstance(value, tuple) else (value,)
                results.append([y.clone() for v in values for y in ranks_of(v)])
    return graph, merged, *results


def count(graph, name):
    modules = [graph.root, *(each.forward for each in graph.templates.values())]
    return sum(name in str(node.target) for module in modules for node in module.graph.nodes)


@pytest.mark.parametrize(
    ("combine", "before", "after"),
    [
        (added, 2, 1),
        (added_thrice, 3, 1),
        (used_twice, 2, 2),
        (broadcast, 2, 2),
        (of_maxima, 2, 2),
        (both_halves, 1, 1),
    ],
)
def test_a_sum_of_reduced_values_is_reduced_once_where_nobody_else_sees_them(
    combine, before, after
):
    graph, merged, expected, found = captured(combine)
    assert count(graph, "all_reduce") == before
    assert count(merged, "all_reduce") == after
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_of_a_sum_of_which_each_rank_keeps_its_share_only_shares_travel():
    graph, merged, expected, found = captured(own_half)
    assert count(graph, "all_reduce") == 1
    assert (count(merged, "all_reduce"), count(merged, "reduce_scatter")) == (0, 1)
    # Rank 0 alone: the graph is its program, and says which part it keeps.
    torch.testing.assert_close(found[0], expected[0], rtol=1e-12, atol=1e-12)


def test_the_notes_say_how_many_were_merged():
    _, merged, *_ = captured(added_thrice)
    (note,) = [note for note in merged.notes if note.by == "merge collectives"]
    assert note.count == 2
