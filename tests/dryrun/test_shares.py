"""A share of a sequence (cp) against the program that its ranks run: a row of fewer tokens."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from plait.cost.accelerators import find_cluster
from plait.dryrun.model_source import decoder_source, module_source
from plait.dryrun.piece import Shape
from plait.dryrun.pieces import PieceStore
from plait.dryrun.price_job import Pricer
from plait.dryrun.work import Part
from plait.plan.parallel_plan import ParallelPlan, Recompute
from tests.dryrun.small_job import CONFIG, JOB

SHARE, TOKENS = 0.25, 1024
SHAPES = {
    "one rank": Shape(sequence_length=TOKENS),
    "sp": Shape(sequence_length=TOKENS, tp=2, sp=True),
    "sp, recompute": Shape(sequence_length=TOKENS, tp=4, sp=True, recompute=Recompute.FULL),
    "scores": Shape(sequence_length=TOKENS, tp=2, sp=True, attention="unfused"),
}


@pytest.fixture(scope="module")
def store():
    return PieceStore(decoder_source(CONFIG), find_cluster("h100", 8))


def passes_of(pieces):
    for piece in (pieces.before, *pieces.layers.values(), pieces.behind):
        yield piece, piece.forward
        yield piece, piece.backward


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_what_works_token_by_token_costs_what_a_row_of_so_many_tokens_costs(store, shape):
    scaled = store.find(shape, SHARE)
    row = store.find(replace(shape, sequence_length=int(SHARE * TOKENS)))
    count = 0
    for (_, mine), (_, theirs) in zip(passes_of(scaled), passes_of(row), strict=True):
        assert len(mine) == len(theirs)
        for work, other in zip(mine, theirs, strict=True):
            got, wanted = work.at(SHARE), other.at(1.0)
            assert got.name == wanted.name
            if got.part is Part.ATTENTION:
                continue
            assert (got.cost, got.num_bytes) == (wanted.cost, wanted.num_bytes), got.name
            count += 1
    assert count > 20
    layer, other = scaled.layers["layer"], row.layers["layer"]
    if shape.attention == "fused":
        assert layer.saved.at(SHARE) == other.saved.at(1.0)
        sizes = [call.at(SHARE).sizes for call in layer.calls]
        assert sizes == [call.at(1.0).sizes for call in other.calls]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_of_a_share_of_the_queries_sees_all_keys(store, shape):
    layer = store.find(shape, SHARE).layers["layer"]
    forward = [x for x in layer.forward if x.low.part is Part.ATTENTION]
    (work,) = (each.at(SHARE) for each in forward)
    heads, size = 8 // shape.tp, 64
    pairs = TOKENS * (TOKENS + 1) // 2  # causal; each rank of cp has as many, as for MFU
    assert work.cost.flops == pytest.approx(SHARE * 4 * heads * pairs * size, rel=1e-3)
    keys = 2 * SHARE * TOKENS * heads * size * 2  # that it sends round, in bfloat16
    assert work.key_bytes == keys
    scores = heads * SHARE * TOKENS * TOKENS
    if shape.attention == "unfused":
        assert sum(each.flops for each in work.kernels) == 4 * scores * size
        fused = store.find(replace(shape, attention="fused"), SHARE).layers["layer"]
        assert layer.saved.at(SHARE) - fused.saved.at(SHARE) == pytest.approx(5 * scores, rel=0.01)


def test_a_search_first_takes_a_share_for_less_than_it_costs_and_captures_nothing_for_it():
    cluster = find_cluster("h100", 8)
    job = replace(JOB, plan=ParallelPlan(cp=4, tp=2, sp=True))
    pricer = Pricer(job, cluster, decoder_source(CONFIG))
    quick = pricer.lower_bounds()
    pricer.price(replace(job, plan=ParallelPlan(fsdp=4, tp=2, sp=True)), fragments=False)
    num_graphs = len(pricer.store.graphs)
    bound = quick.price(job, fragments=False)
    assert len(pricer.store.graphs) == num_graphs
    exact = pricer.price(job, fragments=False)
    assert len(pricer.store.graphs) > num_graphs
    assert 0.8 * exact.step_s < bound.step_s < exact.step_s
    assert 0.5 * exact.peak_bytes < bound.peak_bytes <= exact.peak_bytes


def test_replicas_share_a_capture_and_cost_what_they_cost_alone():
    shape = Shape(sequence_length=2048, tp=4, sp=True)
    cluster = find_cluster("h100", 4)
    both = PieceStore(decoder_source(CONFIG), cluster)
    both.find(replace(shape, replicas=2))
    num_graphs = len(both.graphs)
    found = both.find(replace(shape, replicas=3))
    assert len(both.graphs) == num_graphs + 2  # split, and behind all passes
    assert found == PieceStore(decoder_source(CONFIG), cluster).find(replace(shape, replicas=3))


@pytest.mark.parametrize("tokens", [1023, 1024], ids=["odd", "a model that insists on its length"])
def test_a_sequence_that_cannot_be_halved_is_scaled_from_several(tokens):
    source = module_source(
        ScoredModel(only_tokens=tokens), loss=scored_loss, hidden_size=64, vocab_size=100
    )
    store = PieceStore(source, find_cluster("h100", 8))
    (layer,) = store.find(Shape(sequence_length=tokens), 0.5).layers.values()
    flops = sum(work.at(0.5).cost.flops for work in layer.forward)
    assert flops == pytest.approx(tokens * 64 * 192 + 2 * tokens * tokens * 64)


class ScoredLayer(torch.nn.Module):
    """Attention by hand: scores and a mask over all pairs, which no kernel keeps to itself."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(64, 192)

    def forward(self, x_BTD):
        query_BTD, key_BTD, value_BTD = self.project(x_BTD).chunk(3, dim=-1)
        place_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        hidden_TS = place_T[None, :] > place_T[:, None]
        scores_BTS = query_BTD @ key_BTD.mT / math.sqrt(64)
        return x_BTD + scores_BTS.masked_fill(hidden_TS, -math.inf).softmax(-1) @ value_BTD


class ScoredModel(torch.nn.Module):
    def __init__(self, only_tokens=None):
        super().__init__()
        self.only_tokens = only_tokens
        self.table = torch.nn.Embedding(100, 64)
        self.layers = torch.nn.ModuleList(ScoredLayer() for _ in range(4))

    def forward(self, tokens_BT):
        x_BTD = self.table(tokens_BT)
        if self.only_tokens is not None:
            x_BTD = x_BTD + x_BTD.new_zeros(self.only_tokens, 64)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return x_BTD @ self.table.weight.mT


def scored_loss(model, tokens_BT):
    return functional.cross_entropy(model(tokens_BT).flatten(0, 1), tokens_BT.flatten())


def test_scores_of_a_models_own_are_those_of_the_share_of_queries_with_all_keys():
    source = module_source(ScoredModel(), loss=scored_loss, hidden_size=64, vocab_size=100)
    store = PieceStore(source, find_cluster("h100", 8))
    shape = Shape(sequence_length=TOKENS)
    pieces, whole = store.find(shape, SHARE), store.find(shape)
    (layer,), (one,) = pieces.layers.values(), whole.layers.values()
    queries = SHARE * TOKENS
    flops = sum(work.at(SHARE).cost.flops for work in layer.forward)
    assert flops == 2 * queries * 64 * 192 + 2 * (2 * queries * TOKENS * 64)
    assert layer.saved.at(SHARE) == pytest.approx(SHARE * one.saved.at(1.0), rel=0.01)
    squares = [
        (mine.at(SHARE).cost.bytes, other.at(1.0).cost.bytes)
        for mine, other in zip(layer.forward, one.forward, strict=True)
        if other.at(1.0).cost.bytes > TOKENS * TOKENS * 4
    ]
    assert squares
    assert all(mine == pytest.approx(SHARE * other, rel=0.05) for mine, other in squares)
