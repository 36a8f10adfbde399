"""A piece of a large model: what a rank of tp does and holds of it, for any number of sequences."""

# pyright: basic
# (fx nodes are not typed.)

from collections.abc import Callable
from dataclasses import dataclass, replace

from plait.cost.operations import Cost
from plait.dryrun.requests import CallRequests
from plait.dryrun.saved import Tensor
from plait.dryrun.work import Attention, Kernels, Work
from plait.plan.parallel_plan import Recompute

BEFORE, BEHIND = "before", "behind"
"""Names of the pieces around the layers."""

Points = tuple[float, float]
"""Two numbers of sequences; equal, or from 0, where there is one capture."""


@dataclass(frozen=True)
class Line:
    """A value at two numbers of sequences, and affine in them."""

    points: Points
    low: float
    high: float

    def at(self, sequences: float) -> float:
        """The value for so many sequences; not below zero."""
        first, second = self.points
        if first == second:
            return self.low
        share = (sequences - first) / (second - first)
        return max(0.0, self.low + share * (self.high - self.low))


def _between(points: Points, sequences: float) -> Callable[[float, float], int]:
    """The whole number for so many sequences, from those at the two points."""
    return lambda first, second: round(Line(points, first, second).at(sequences))


@dataclass(frozen=True)
class ScaledWork:
    """An operation at two numbers of sequences."""

    points: Points
    low: Work
    high: Work

    def at(self, sequences: float) -> Work:
        """The operation with so many sequences."""
        between = _between(self.points, sequences)
        pairs = zip(self.low.kernels, self.high.kernels, strict=True)
        return replace(
            self.low,
            cost=_cost_at(self.low.cost, self.high.cost, between),
            num_bytes=between(self.low.num_bytes, self.high.num_bytes),
            key_bytes=between(self.low.key_bytes, self.high.key_bytes),
            kernels=tuple(_cost_at(*pair, between) for pair in pairs),
        )


def _cost_at(low: Cost, high: Cost, between: Callable[[float, float], int]) -> Cost:
    sizes = None
    if low.sizes is not None and high.sizes is not None:
        pairs = zip(low.sizes, high.sizes, strict=True)
        rows, inner, columns = (max(1, between(a, b)) for a, b in pairs)
        sizes = rows, inner, columns
    return Cost(
        kind=low.kind,
        bytes=between(low.bytes, high.bytes),
        flops=between(low.flops, high.flops),
        dtype=low.dtype,
        sizes=sizes,
    )


@dataclass(frozen=True)
class ScaledCall:
    """Requests at two numbers of sequences, which differ in their sizes only."""

    points: Points
    low: CallRequests
    high: CallRequests

    def at(self, sequences: float) -> CallRequests:
        """The requests with so many sequences."""
        between = _between(self.points, sequences)
        sizes = {
            number: between(x, self.high.sizes[number]) for number, x in self.low.sizes.items()
        }
        input_bytes = between(self.low.input_bytes, self.high.input_bytes)
        return replace(self.low, sizes=sizes, input_bytes=input_bytes)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A layer, or what stands before or behind them, on one rank of tp.

    Elements are parameters on this rank, those of experts apart. saved and the two peaks are bytes:
    kept for the backward, and live besides that while a pass runs; expert_peak: on top of these, of
    what all experts have a part of, before ep. parameters, saved_tensors: by
    name and line, in the bytes of the larger capture. calls: what the piece asks the allocator
    for, in the order of the forward.
    """

    name: str
    forward: tuple[ScaledWork, ...]
    backward: tuple[ScaledWork, ...]
    num_elements: int
    num_expert_elements: int
    saved: Line
    forward_peak: Line
    backward_peak: Line
    expert_peak: Line
    source: str = ""
    parameters: tuple[Tensor, ...] = ()
    saved_tensors: tuple[Tensor, ...] = ()
    calls: tuple[ScaledCall, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """All pieces of a model on one rank of tp, for one length of sequence.

    layers: by the kind of the layer. is_shared_head: whether the vocabulary is parted over tp.
    """

    before: Piece
    layers: dict[str, Piece]
    behind: Piece
    is_shared_head: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a capture depends on."""

    sequence_length: int
    tp: int = 1
    sp: bool = False
    replicas: int | str = 1
    recompute: Recompute = Recompute.NONE
    kernels: Kernels = "fused"
    share_head: bool = True
    attention: Attention = "fused"
    reruns_all: bool = False
