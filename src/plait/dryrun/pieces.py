"""A large model in pieces: what stands before the layers, each kind of layer, what is behind.

One sequence in a micro-batch is captured as it is. For other numbers, captures with one and with
two give each operation's cost as a straight line: arithmetic, bytes and sizes of a token-wise
operation are affine in the tokens, and so is attention as long as sequences keep their length. A
share of a sequence (cp) lies on that line too: of its queries attention has a share, and all keys.
Where one sequence makes another program than two (a copy may be a view), two and three are taken.
"""

# pyright: basic
# (fx nodes are not typed.)

import warnings
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from plait.compiler.levels import RECOMPUTE, Pass, passes_of
from plait.compiler.order import fillers_of, weight_arguments
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
from plait.dryrun.requests import CallRequests, requests_of, with_scores
from plait.dryrun.saved import Held, Tensor, held_of
from plait.dryrun.work import Part, Work, work_of
from plait.errors import GraphError, PlanError
from plait.graph.capture import capture
from plait.graph.cut import BETWEEN
from plait.graph.graph import BACKWARD, FORWARD, Graph, Role, call_of
from plait.plan.find_rules import legal_sizes
from plait.plan.parallel_plan import ParallelPlan, Recompute


class _DifferentProgramsError(GraphError):
    """Two numbers of sequences are captured as different programs."""


_SPLIT_LAYERS = 3
"""Captured beside the first with replicas: the first piece spans two layers, two are alike."""


_LINES: tuple[Points, ...] = ((1.0, 2.0), (2.0, 3.0))


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

    graphs: by what they depend on, before recompute, and again after it, with its policy.
    """

    source: ModelSource
    cluster: Cluster
    graphs: dict[tuple[object, ...], Graph] = field(default_factory=dict)
    pieces: dict[tuple[Shape, float | None], Pieces] = field(default_factory=dict)

    def find(self, shape: Shape, sequences: float = 1.0) -> Pieces:
        """The pieces of a shape, to be scaled to so many sequences.

        Raises PlanError if the model cannot be parted so.
        """
        # Replicas are costly to make, and few plans are priced with them: one capture, as it is.
        is_split = shape.replicas != 1
        key = shape, sequences if is_split or sequences == 1 else None
        if key not in self.pieces:
            self.check(shape)
            if is_split:
                self.pieces[key] = _split_pieces(self, shape, sequences)
            else:
                self.pieces[key] = _pieces(self, shape, (1, 1)) if key[1] else self._line(shape)
        return self.pieces[key]

    def _line(self, shape: Shape) -> Pieces:
        first, second = _LINES
        try:
            return _pieces(self, shape, first)
        except _DifferentProgramsError:
            return _pieces(self, shape, second)

    def called(self, shape: Shape, points: Points, extra: int) -> list[list["_Program"]]:
        """The programs of both captures."""
        low, high = map(int, points)
        first = _called(self.graph(shape, low, extra), shape)
        if low == high:
            return [first, first]
        return [first, _called(self.graph(shape, high, extra), shape)]

    def graph(self, shape: Shape, batch: int, extra: int) -> Graph:
        """A captured graph of one layer of each kind, and the last kind `extra` times more."""
        key = (shape.sequence_length, shape.tp, shape.sp, shape.replicas, shape.share_head)
        key = (*key, batch, extra)
        plan = ParallelPlan(
            tp=shape.tp, sp=shape.sp, replicas=shape.replicas, recompute=shape.recompute
        )
        passes = passes_of("O0", "fast", plan)
        own = passes.index(RECOMPUTE)  # those before it are the same for every policy
        if key not in self.graphs:
            captured = self._capture(shape, batch, extra)
            self.graphs[key] = self._run(passes[:own], captured, plan)
        passed = (*key, shape.recompute)
        if passed not in self.graphs:
            self.graphs[passed] = self._run(passes[own:], self.graphs[key], plan)
        return self.graphs[passed]

    def _capture(self, shape: Shape, batch: int, extra: int) -> Graph:
        layers = list(self.source.kind_layers)
        layers += layers[-1:] * extra
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


@dataclass(frozen=True)
class _Program:
    """A template as it is called: both programs, and what they hold."""

    name: str
    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    held: Held
    num_elements: int
    num_expert_elements: int
    source: str
    parameters: tuple[Tensor, ...]
    calls: tuple[CallRequests, ...]


def _pieces(store: PieceStore, shape: Shape, points: Points) -> Pieces:
    kinds = list(dict.fromkeys(store.source.kinds))
    # A layer is a block only beside others of its class, so a kind that is alone stands twice.
    extra = int(len(kinds) == 1)
    low, high = (_by_place(each) for each in store.called(shape, points, extra))
    if len(low) != len(kinds) + 2 + extra:
        raise GraphError(
            f"{store.source.name} is captured with {max(len(low) - 2, 0)} layers, "
            f"{len(kinds) + extra} were expected: its layers are no blocks of one ModuleList."
        )
    if extra:
        del low[2], high[2]
    names = [BEFORE, *kinds, BEHIND]
    pieces = [_piece(*each, points) for each in zip(names, low, high, strict=True)]
    return Pieces(
        before=pieces[0],
        layers=dict(zip(kinds, pieces[1:-1], strict=True)),
        behind=pieces[-1],
        is_shared_head=shape.share_head and shape.tp > 1,
        notes=_unknown_operators(low),
    )


def _unknown_operators(programs: Sequence[_Program]) -> tuple[str, ...]:
    works = (work for each in programs for work in (*each.forward, *each.backward))
    unknown = sorted({work.unknown for work in works} - {""})
    if not unknown:
        return ()
    return (
        f"warning: no cost is known of {', '.join(unknown)}: priced by the bytes that go in and "
        "out. Register a formula with torch.utils.flop_counter.register_flop_formula.",
    )


def _by_place(programs: Sequence[_Program]) -> list[_Program]:
    """What stands before the layers as one, each layer, and what stands behind as one."""
    layers = [i for i, each in enumerate(programs) if each.source != BETWEEN]
    if not layers:
        return []
    first, last = layers[0], layers[-1]
    return [
        _joined(programs[:first]),
        *programs[first : last + 1],
        _joined(programs[last + 1 :]),
    ]


def _joined(programs: Sequence[_Program]) -> _Program:
    """Several programs as one, one after another."""
    return _Program(
        name="+".join(each.name for each in programs),
        forward=_in_turn([each.forward for each in programs]),
        backward=_in_turn([each.backward for each in reversed(programs)]),
        held=Held(
            saved_bytes=sum(each.held.saved_bytes for each in programs),
            forward_peak_bytes=max((each.held.forward_peak_bytes for each in programs), default=0),
            backward_peak_bytes=max(
                (each.held.backward_peak_bytes for each in programs), default=0
            ),
            expert_peak_bytes=max((each.held.expert_peak_bytes for each in programs), default=0),
            saved=tuple(x for each in programs for x in each.held.saved),
        ),
        num_elements=sum(each.num_elements for each in programs),
        num_expert_elements=sum(each.num_expert_elements for each in programs),
        source=BETWEEN,
        parameters=tuple(x for each in programs for x in each.parameters),
        calls=tuple(call for each in programs for call in each.calls),
    )


def _in_turn(programs: Sequence[tuple[Work, ...]]) -> tuple[Work, ...]:
    found: list[Work] = []
    for program in programs:
        start = len(found)
        found += [
            replace(work, depends_on=tuple(start + i for i in work.depends_on)) for work in program
        ]
    return tuple(found)


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
    programs = _called(graph, shape)
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


def _called(graph: Graph, shape: Shape) -> list[_Program]:
    """The templates that the root calls, in order, forward and backward."""
    weights = weight_arguments(graph)
    shared = Counter(
        x
        for node in graph.root.graph.nodes
        if (called := call_of(node)) and called[1] == FORWARD
        for x in node.args[2:]
        if isinstance(x, fx.Node)
    )
    seen: dict[str, tuple[tuple[Work, ...], tuple[Work, ...]]] = {}
    found: list[_Program] = []
    for node in graph.root.graph.nodes:
        called = call_of(node)
        if called is None or called[1] == BACKWARD:
            continue
        template = graph.templates[called[0]]
        if template.name not in seen:
            fillers = set()
            if template.backward is not None:
                fillers = fillers_of(template, weights.get(template.name, set()))
            backward = template.backward
            seen[template.name] = (
                work_of(template.forward, shape.kernels, attention=shape.attention),
                ()
                if backward is None
                else work_of(backward, shape.kernels, fillers, shape.attention),
            )
        parameters = [
            x.meta["val"]
            for x in node.args[2:]
            if isinstance(x, fx.Node)
            and x.op == "placeholder"
            and x.meta["val"].role is Role.PARAMETER
        ]
        own = [
            i
            for i, x in enumerate(node.args[2:])
            if isinstance(x, fx.Node) and x.op == "call_function" and shared[x] == 1
        ]
        of_experts = [v for v in parameters if ".experts." in v.name]
        experts = sum(_count(v.shape) for v in of_experts)
        stacked = {tuple(map(int, v.shape)) for v in of_experts}
        scores = _scores(*seen[template.name], shape)
        found.append(
            _Program(
                template.name,
                *seen[template.name],
                held=_with_scores(held_of(template, own, stacked), *scores),
                calls=(with_scores(requests_of(template, own, stacked), *scores),),
                num_elements=sum(_count(v.shape) for v in parameters) - experts,
                num_expert_elements=experts,
                source=template.block,
                parameters=tuple(
                    Tensor(num_bytes=value.num_bytes, name=value.name) for value in parameters
                ),
            )
        )
    return found


def _scores(forward: Sequence[Work], backward: Sequence[Work], shape: Shape) -> tuple[int, int]:
    """Bytes that attention that is not fused keeps of its scores, and while it runs.

    What runs again keeps nothing.
    """
    one = max((each.score_bytes for each in (*forward, *backward)), default=0)
    saved = 0 if shape.recompute is Recompute.FULL else sum(each.score_bytes for each in forward)
    return saved, one


def _with_scores(held: Held, saved: int, one: int) -> Held:
    scores = (Tensor(num_bytes=saved, name="scores of attention"),) if saved else ()
    return replace(
        held,
        saved=(*held.saved, *scores),
        saved_bytes=held.saved_bytes + saved,
        forward_peak_bytes=held.forward_peak_bytes + one - min(one, saved),
        backward_peak_bytes=held.backward_peak_bytes + one,
    )


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _piece(name: str, one: _Program, two: _Program, points: Points) -> Piece:
    def line(attribute: str) -> Line:
        return Line(points, getattr(one.held, attribute), getattr(two.held, attribute))

    return Piece(
        name=name,
        forward=_scaled(one.forward, two.forward, points),
        backward=_scaled(one.backward, two.backward, points),
        num_elements=one.num_elements,
        num_expert_elements=one.num_expert_elements,
        saved=line("saved_bytes"),
        forward_peak=line("forward_peak_bytes"),
        backward_peak=line("backward_peak_bytes"),
        expert_peak=line("expert_peak_bytes"),
        source=one.source,
        parameters=one.parameters,
        saved_tensors=one.held.saved,
        calls=_scaled_calls(one.calls, two.calls, points),
    )


def _scaled_calls(
    one: Sequence[CallRequests], two: Sequence[CallRequests], points: Points
) -> tuple[ScaledCall, ...]:
    pairs = list(zip(one, two, strict=True))
    if any((a.forward, a.backward) != (b.forward, b.backward) for a, b in pairs):
        raise _DifferentProgramsError(
            f"micro-batches of {points[0]:g} and {points[1]:g} sequences ask for memory in "
            "different orders, so it cannot be scaled. Choose one sequence in a micro-batch."
        )
    return tuple(ScaledCall(points, low, high) for low, high in pairs)


def _scaled(one: Sequence[Work], two: Sequence[Work], points: Points) -> tuple[ScaledWork, ...]:
    names = [(work.name, work.depends_on, work.collective) for work in one]
    if names != [(work.name, work.depends_on, work.collective) for work in two]:
        raise _DifferentProgramsError(
            f"micro-batches of {points[0]:g} and {points[1]:g} sequences are captured as different "
            "programs, so their price cannot be scaled. Choose one sequence in a micro-batch."
        )
    return tuple(ScaledWork(points, low, high) for low, high in zip(one, two, strict=True))
