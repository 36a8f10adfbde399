"""A large model in pieces: what stands before the layers, each kind of layer, what is behind.

One sequence in a micro-batch is captured as it is. For other numbers, captures with one and with
two give each operation's cost as a straight line: arithmetic, bytes and sizes of a token-wise
operation are affine in the tokens, and so is attention as long as sequences keep their length.
Where one sequence makes another program than two (a copy may be a view), two and three are taken.
A share of a sequence (cp) lies on the line through half of one and one, for it is a row of fewer
tokens; attention, and what else grows with their square, has a share of the queries and all keys.
"""

# pyright: basic
# (fx nodes are not typed.)

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from plait.compiler.levels import RECOMPUTE, REPLICAS, Pass, passes_of
from plait.cost.clusters import Cluster
from plait.dryrun.fused_attention import gpu_attention
from plait.dryrun.model_source import ModelSource
from plait.dryrun.piece import (
    BEFORE,
    BEHIND,
    Line,
    Piece,
    Pieces,
    Points,
    ScaledCall,
    ScaledWork,
    Shape,
)
from plait.dryrun.programs import (
    Program,
    by_place,
    programs_of,
    seeing_all,
    unknown_operators,
    without_cost,
)
from plait.dryrun.work import Part, Work
from plait.errors import GraphError, PlanError
from plait.graph.capture import capture
from plait.graph.graph import Graph
from plait.plan.find_rules import legal_sizes
from plait.plan.parallel_plan import ParallelPlan, Recompute


class _DifferentProgramsError(GraphError):
    """Two numbers of sequences are captured as different programs."""


_SPLIT_LAYERS = 3
"""Captured beside the first with replicas: the first piece spans two layers, two are alike."""


_ONE: Points = (1.0, 1.0)
_SEVERAL: tuple[Points, ...] = ((1.0, 2.0), (2.0, 3.0))
_SHARE: tuple[Points, ...] = ((0.5, 1.0), *_SEVERAL)
"""Lines in the order in which they are tried."""
_BOUND: Points = (0.0, 1.0)


@contextmanager
def without_torch_warnings() -> Generator[None]:
    """Keep back what TorchDynamo warns of in PyTorch's distributed code and in transformers."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*functools.lru_cache", UserWarning)
        warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
        yield


@dataclass
class PieceStore:
    """Captures each shape of a model once.

    graphs: by what they depend on: before replicas, before recompute, and behind all passes.
    bounds_shares: a share of a sequence is taken for that share of a whole one: at most its cost
    (what does not shrink with the tokens is left out), and without a capture of its own.
    """

    source: ModelSource
    cluster: Cluster
    graphs: dict[tuple[object, ...], Graph] = field(default_factory=dict)
    pieces: dict[tuple[Shape, Points, float | None], Pieces] = field(default_factory=dict)
    bounds_shares: bool = False

    def find(self, shape: Shape, sequences: float = 1.0) -> Pieces:
        """The pieces of a shape, to be scaled to so many sequences.

        Raises PlanError if the model cannot be parted so.
        """
        # Replicas are costly to make, and few plans are priced with them: one capture, as it is.
        is_split = shape.replicas != 1
        lines = (_ONE,) if sequences == 1 else _SEVERAL if sequences > 1 else _SHARE
        if sequences < 1 and self.bounds_shares:
            lines = (_BOUND,)
        key = shape, lines[0], sequences if is_split else None
        if key not in self.pieces:
            self.check(shape)
            self.pieces[key] = (
                _split_pieces(self, shape, sequences) if is_split else self._line(shape, lines)
            )
        return self.pieces[key]

    def _line(self, shape: Shape, lines: Sequence[Points]) -> Pieces:
        for points in lines[:-1]:
            try:
                return _pieces(self, shape, points)
            except _DifferentProgramsError:
                continue
        return _pieces(self, shape, lines[-1])

    def programs(self, shape: Shape, sequences: float, extra: int) -> list[Program]:
        """The programs of a capture of so many sequences, or of half of one."""
        if sequences >= 1:
            return programs_of(self.graph(shape, int(sequences), extra), shape)
        half = replace(shape, sequence_length=shape.sequence_length // 2)
        try:
            if shape.sequence_length % 2:
                raise PlanError(f"{shape.sequence_length} tokens are odd.")
            self.check(half)
            return programs_of(self.graph(half, 1, extra), half)
        except (GraphError, PlanError) as error:  # a model may insist on its length
            raise _DifferentProgramsError(f"a sequence cannot be halved: {error}") from error

    def graph(self, shape: Shape, batch: int, extra: int) -> Graph:
        """A captured graph of one layer of each kind, behind `extra` more of the first."""
        plan = ParallelPlan(
            tp=shape.tp, sp=shape.sp, replicas=shape.replicas, recompute=shape.recompute
        )
        passes = passes_of("O0", "fast", plan)
        recompute = passes.index(RECOMPUTE)
        replicas = passes.index(REPLICAS) if REPLICAS in passes else recompute
        is_split = shape.replicas != 1
        key = (shape.sequence_length, shape.tp, shape.sp, shape.share_head, batch, extra, is_split)
        # Passes before replicas are the same for each number, those before recompute for each
        # policy.
        stages = (
            ((), passes[:replicas]),
            ((shape.replicas,), passes[replicas:recompute]),
            ((shape.recompute,), passes[recompute:]),
        )
        found: Graph | None = None
        for own, steps in stages:
            key = (*key, *own)
            if key not in self.graphs:
                found = self._capture(shape, batch, extra) if found is None else found
                self.graphs[key] = self._run(steps, found, plan)
            found = self.graphs[key]
        assert found is not None
        return found

    def _capture(self, shape: Shape, batch: int, extra: int) -> Graph:
        kinds = self.source.kind_layers
        layers = [*(kinds[0] for _ in range(extra)), *kinds]
        model = self.source.make(layers, self._vocabulary(shape))
        with torch.device("meta"):
            tokens_BT = torch.empty((batch, shape.sequence_length), dtype=torch.int64)
        # With recompute a piece has one layer, also where replicas go through attention.
        plan = ParallelPlan(
            tp=shape.tp, sp=shape.sp, replicas=shape.replicas, recompute=Recompute.SELECTIVE
        )
        with without_torch_warnings(), gpu_attention():
            return capture(model, tokens_BT, plan, loss=self.source.loss)

    def _run(self, passes: Sequence[Pass], graph: Graph, plan: ParallelPlan) -> Graph:
        for each in passes:
            graph = each(graph, plan, self.cluster)
        return graph

    def _vocabulary(self, shape: Shape) -> int:
        return -(-self.source.vocab_size // (shape.tp if shape.share_head else 1))

    def check(self, shape: Shape) -> None:
        """Raise PlanError where tp does not divide the model or its tokens."""
        source = self.source
        wrong = [f"{name}={count}" for name, count in source.counts.items() if count % shape.tp]
        if wrong:
            legal = ", ".join(map(str, legal_sizes(source.counts)))
            raise PlanError(
                f"tp={shape.tp} does not divide {', '.join(wrong)} of {source.name}. "
                f"Choose tp from {legal}."
            )
        if shape.sp and shape.sequence_length % shape.tp:
            raise PlanError(
                f"sp shares the tokens over tp={shape.tp}, which does not divide "
                f"sequence_length={shape.sequence_length}."
            )


def _pieces(store: PieceStore, shape: Shape, points: Points) -> Pieces:
    kinds = list(dict.fromkeys(store.source.kinds))
    # A layer is a block only beside others of its class, so a kind that is alone stands twice. The
    # first of all may differ: with sp that of a model of transformers takes its own tokens.
    extra = int(len(kinds) == 1 or shape.sp)
    high = by_place(store.programs(shape, points[1], extra))
    has_own_low = points not in (_ONE, _BOUND)
    low = by_place(store.programs(shape, points[0], extra)) if has_own_low else list(high)
    if len(low) != len(high):
        raise _DifferentProgramsError(f"{len(low)} and {len(high)} programs cannot be scaled.")
    if len(low) != len(kinds) + 2 + extra:
        raise GraphError(
            f"{store.source.name} is captured with {max(len(low) - 2, 0)} layers, "
            f"{len(kinds) + extra} were expected: its layers are no blocks of one ModuleList."
        )
    if extra:
        del low[1], high[1]
    names = [BEFORE, *kinds, BEHIND]
    pieces = [_piece(*each, points) for each in zip(names, low, high, strict=True)]
    return Pieces(
        before=pieces[0],
        layers=dict(zip(kinds, pieces[1:-1], strict=True)),
        behind=pieces[-1],
        is_shared_head=shape.share_head and shape.tp > 1,
        notes=unknown_operators(low),
    )


def _split_pieces(store: PieceStore, shape: Shape, sequences: float) -> Pieces:
    """The unsplit pieces, with the layer's programs replaced by those of replicas.

    With replicas a piece goes from attention to attention, so the one between two layers is priced
    as a layer. What stands around the layers stays unsplit; splitting it too would gain a little.
    """
    whole = store.find(replace(shape, replicas=1), sequences)
    if len(whole.layers) > 1:
        raise PlanError(
            f"replicas are priced for models with one kind of layer; {store.source.name} has "
            f"{', '.join(whole.layers)}. Choose replicas=1."
        )
    is_share = not float(sequences).is_integer()
    if is_share:  # a rank of cp has one row of so many tokens
        shape = replace(shape, sequence_length=round(shape.sequence_length * sequences))
        store.check(shape)
    graph = store.graph(shape, 1 if is_share else int(sequences), _SPLIT_LAYERS)
    programs = programs_of(graph, shape)
    if len(programs) < 4 or programs[1].name != programs[2].name:
        raise PlanError(
            f"replicas={shape.replicas} leave the layers of {store.source.name} different from "
            "each other, so that one cannot stand for all. Choose replicas=1."
        )
    split = _piece("layer", programs[1], programs[1], (sequences, sequences))
    layers = {}
    for kind, piece in whole.layers.items():
        forward, backward = split.forward, split.backward
        if is_share:
            forward = _with_attention_of(piece.forward, forward)
            backward = _with_attention_of(piece.backward, backward)
        layers[kind] = replace(piece, forward=forward, backward=backward)
    notes = dict.fromkeys((*whole.notes, *map(str, graph.notes)))
    return replace(whole, layers=layers, notes=tuple(notes))


def _with_attention_of(
    whole: Sequence[ScaledWork], split: Sequence[ScaledWork]
) -> tuple[ScaledWork, ...]:
    """The split program with the other's attention: a share of the queries sees all keys."""
    known = [each for each in whole if each.low.part is Part.ATTENTION]
    if len(known) != sum(each.low.part is Part.ATTENTION for each in split):
        raise PlanError(
            "replicas that go through attention are not priced beside cp. Choose replicas=1."
        )
    rest = iter(known)
    return tuple(
        replace(
            each,
            points=(other := next(rest)).points,
            low=replace(other.low, name=each.low.name, depends_on=each.low.depends_on),
            high=replace(other.high, name=each.low.name, depends_on=each.low.depends_on),
        )
        if each.low.part is Part.ATTENTION
        else each
        for each in split
    )


def _piece(name: str, one: Program, two: Program, points: Points) -> Piece:
    _check_alike(one, two, points)
    if points == _BOUND:
        one = without_cost(one)
    elif points[0] < 1:
        one = seeing_all(one, two)

    def line(attribute: str) -> Line:
        return Line(points, getattr(one.held, attribute), getattr(two.held, attribute))

    def scaled(low: Sequence[Work], high: Sequence[Work]) -> tuple[ScaledWork, ...]:
        return tuple(ScaledWork(points, *pair) for pair in zip(low, high, strict=True))

    return Piece(
        name=name,
        forward=scaled(one.forward, two.forward),
        backward=scaled(one.backward, two.backward),
        num_elements=one.num_elements,
        num_expert_elements=one.num_expert_elements,
        saved=line("saved_bytes"),
        forward_peak=line("forward_peak_bytes"),
        backward_peak=line("backward_peak_bytes"),
        expert_peak=line("expert_peak_bytes"),
        source=one.source,
        parameters=one.parameters,
        saved_tensors=two.held.saved,
        calls=tuple(ScaledCall(points, *pair) for pair in zip(one.calls, two.calls, strict=True)),
    )


def _check_alike(one: Program, two: Program, points: Points) -> None:
    what = f"micro-batches of {points[0]:g} and {points[1]:g} sequences"
    advice = "Choose one sequence in a micro-batch."

    def steps(program: Program) -> list[tuple[object, ...]]:
        works = (*program.forward, *program.backward)
        return [(work.name, work.depends_on, work.collective) for work in works]

    def orders(program: Program) -> list[tuple[object, ...]]:
        return [(call.forward, call.backward) for call in program.calls]

    if steps(one) != steps(two):
        raise _DifferentProgramsError(
            f"{what} are captured as different programs, so their price cannot be scaled. {advice}"
        )
    if orders(one) != orders(two):
        raise _DifferentProgramsError(
            f"{what} ask for memory in different orders, so it cannot be scaled. {advice}"
        )
