"""What stops the split of tokens: it is named, the rest of the step is split, and all is equal."""

import pytest
import torch
from torch import nn
from torch.distributed._local_tensor import LocalTensorMode
from torch.nn import functional as F

import plait
from plait.compiler.merge import merge
from plait.compiler.replicate import parts_of
from plait.compiler.separate import separate
from plait.errors import PlanError
from plait.graph.distributed import name_groups
from plait.graph.parallelize import keep_local_parameters, parallelize
from plait.graph.plan_mesh import plan_mesh
from tests.compiler.replica_models import ranks_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:While compiling, we found certain side effects:UserWarning",
)
TOKENS, WIDTH = 24, 16
PLAN = plait.ParallelPlan(tp=2)
RULES = {"layers.*.up": "column", "layers.*.down": "row"}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """A layer that mixes tokens, between two that are shared by the ranks."""

    def __init__(self, mix):
        super().__init__()
        torch.manual_seed(0)
        self.mix = mix()
        self.layers = nn.ModuleList(Mlp() for _ in range(2))

    def forward(self, x):
        return self.layers[1](self.mix(self.layers[0](x)))


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class OverTokens(nn.Module):
    """A module of (batch, features, tokens)."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x.transpose(1, 2)).transpose(1, 2)


class LimitedExperts(nn.Module):
    """An expert takes the first tokens that choose it, as many as its capacity; others pass by."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x_BTD):
        share_BTE = self.router(x_BTD).softmax(-1)
        chosen_BTE = F.one_hot(share_BTE.argmax(-1), 4).to(x_BTD.dtype)
        taken_BTE = chosen_BTE * (chosen_BTE.cumsum(1) <= 3)
        y_BTED = self.experts(x_BTD).unflatten(-1, (4, WIDTH))
        return x_BTD + (y_BTED * (taken_BTE * share_BTE)[..., None]).sum(2)


def fold(x):
    """The mean of quarters of the sequence, four times."""
    return x.view(1, 4, TOKENS // 4, WIDTH).mean(1).repeat(1, 4, 1)


MIXERS = {
    "batch_norm": (
        lambda: OverTokens(nn.BatchNorm1d(WIDTH, track_running_stats=False)),
        "_batch_norm",
    ),
    "convolution": (lambda: OverTokens(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)), "convolution"),
    "pooling": (lambda: OverTokens(nn.AvgPool1d(3, 1, 1)), "avg_pool"),
    "cumsum": (lambda: Call(lambda x: x.cumsum(1)), "cumsum"),
    "sort": (lambda: Call(lambda x: x.sort(1).values), "sort"),
    "softmax": (lambda: Call(lambda x: x.softmax(1)), "_softmax"),
    "flip": (lambda: Call(lambda x: x.flip(1)), "flip"),
    "roll": (lambda: Call(lambda x: x.roll(3, 1)), "roll"),
    "slices": (lambda: Call(lambda x: torch.cat([x[:, 5:], x[:, :5]], 1)), "slice"),
    "shift": (lambda: Call(lambda x: F.pad(x[:, :-1], (0, 0, 1, 0))), "slice"),
    "mean": (lambda: Call(lambda x: x - x.mean(1, keepdim=True)), "mean"),
    "fold": (lambda: Call(fold), "mean"),
    "reshape": (lambda: Call(lambda x: x.reshape(1, WIDTH, TOKENS).transpose(1, 2)), "view"),
    "outer": (lambda: Call(lambda x: x @ (x.transpose(1, 2) @ x)), "bmm"),
    "experts": (LimitedExperts, "cumsum"),
}


def squares(model, x):
    return (model(x) * torch.linspace(0.5, 1.5, TOKENS)[:, None]).square().mean()


def inputs():
    return torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def graph_of(mix, rules):
    with plan_mesh(PLAN) as mesh:
        model = parallelize(Model(mix), PLAN, mesh, rules=rules)
        graph = plait.capture(keep_local_parameters(model), inputs(), loss=squares)
        name_groups(graph, [mesh])
        return graph


def rules_of(mix):
    owners = {n.rpartition(".")[0] for n, _ in Model(mix).named_parameters()}
    return {**RULES, **{name: "whole" for name in owners if name.startswith("mix")}}


def results(schedule, mix, rules):
    with plan_mesh(PLAN) as mesh:
        whole = Model(mix)
        with LocalTensorMode(PLAN.tp) as mode:
            model = parallelize(whole, PLAN, mesh, rules=rules)
            x = mode.rank_map(lambda _: inputs())
            value = plait.run(schedule, model, x, mesh=mesh)
            found = {"loss": ranks_of(value)}
            found |= {n: ranks_of(p.grad) for n, p in model.named_parameters()}
            return {name: [x.clone() for x in ranks] for name, ranks in found.items()}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("replicas", [2, 3])
def test_what_mixes_tokens_stops_the_split_is_named_and_all_is_equal(name, replicas):
    mix, culprit = MIXERS[name]
    rules = rules_of(mix)
    graph = graph_of(mix, rules)
    plan = plait.ParallelPlan(tp=2, replicas=replicas)
    split = plait.compile(graph, plan, numerics="strict")
    refused = [note for note in split.notes if note.by == "replicas" and note.is_refusal]
    assert any(culprit in note.operator for note in refused), "\n".join(
        str(note) for note in refused
    )
    done = [n for n in split.notes if "split in" in n.text]
    assert sum(note.count for note in done if "all_reduce" in note.operator) >= 1
    whole = plait.compile(merge(separate(graph)), plait.ParallelPlan(), numerics="strict")
    found, expected = results(split, mix, rules), results(whole, mix, rules)
    for key, ranks in expected.items():
        for x, y in zip(found[key], ranks, strict=True):
            assert torch.equal(x, y), key


def test_a_graph_that_is_not_made_of_pieces_is_refused():
    """(A buffer that changes makes the graph one piece.)"""
    model = Model(lambda: OverTokens(nn.BatchNorm1d(WIDTH)))
    graph = plait.capture(model, inputs(), loss=squares)
    with pytest.raises(PlanError, match=r"captured as one piece.*in add_ \(.*self\.module\(x"):
        plait.compile(graph, plait.ParallelPlan(replicas=2))


@pytest.mark.parametrize(
    ("total", "count", "share", "sizes"),
    [
        (128, 2, 1, (64, 64)),
        (320, 3, 1, (64, 128, 128)),
        (130, 3, 2, (42, 44, 44)),
        (129, 2, 1, (64, 65)),
        (24, 4, 4, (4, 4, 8, 8)),
        (8, 4, 2, (2, 2, 2, 2)),
    ],
)
def test_parts_are_multiples_of_what_ranks_share_and_of_vectors_where_they_can(
    total, count, share, sizes
):
    assert parts_of(total, count, share).sizes == sizes


@pytest.mark.parametrize(
    ("total", "shares", "sizes"),
    [
        (2048, (1, 2, 3, 2), (256, 512, 768, 512)),
        (1000, (5, 7, 4), (256, 448, 296)),
        (256, (1, 2, 3, 2), (64, 64, 64, 64)),
        (6, (1, 2, 3, 2), (1, 1, 2, 2)),
    ],
)
def test_parts_are_as_near_to_their_shares_as_units_allow_and_none_is_empty(total, shares, sizes):
    assert parts_of(total, len(shares), 1, shares).sizes == sizes


def test_too_few_tokens_are_refused_with_the_largest_number():
    with pytest.raises(PlanError, match=r"8 tokens over 4 ranks.*at most 2 replicas"):
        parts_of(8, 3, 4)


def test_an_explicit_number_without_a_collective_to_hide_raises_and_auto_says_why():
    graph = plait.capture(Model(nn.Identity), inputs(), loss=squares)
    with pytest.raises(
        PlanError, match=r"no collective can be split.*the graph has none.*replicas=1"
    ):
        plait.compile(graph, plait.ParallelPlan(replicas=2))
    schedule = plait.compile(graph, plait.ParallelPlan(replicas="auto"))
    assert any("no collective can be split" in note.text for note in schedule.notes)


def test_an_explicit_number_of_a_batch_that_is_too_small_raises():
    graph = plait.capture(Model(nn.Identity), inputs().expand(2, -1, -1), loss=squares)
    with pytest.raises(PlanError, match="replicas=3 of a batch of 2"):
        plait.compile(graph, plait.ParallelPlan(replicas=3))


def test_a_dropout_that_is_put_apart_draws_what_it_drew():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)

        def forward(self, x):
            return self.linear(self.dropout(self.linear(self.dropout(x))))

    model = Dropping()
    graph = plait.capture(model, inputs(), loss=squares)
    found = []
    for each in (graph, separate(graph)):
        model.zero_grad()
        torch.manual_seed(3)
        value = plait.run(plait.compile(each), model, inputs())
        found.append([value, torch.rand(4), *(p.grad for p in model.parameters())])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
