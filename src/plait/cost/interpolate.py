"""Times of operators that were not measured, from entries of a table that are near.

Between entries of one operator and dtype (a family) the ratio of measured time to roofline is
interpolated over the logarithms of sizes. Entries of the same variant (what is constant, strided
and of which dtype among the operands) go first: a mask or a cap may double a kernel's time. A
kernel that works in pieces (`Cost.pieces`) is compared with a roofline and a cost of each piece,
which are fitted first. How far all this may be off is measured: each entry is predicted from the
others.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from plait.cost.clusters import Device
from plait.cost.operations import Cost, Kind, operation_s
from plait.cost.table_entry import Entry, cost_of_entry

_NUM_NEIGHBOURS = 4
_FAR = math.log(4.0)
"""Sizes that lie further from every entry than four times are not interpolated."""
_FAR_IN_PIECES = math.log(16.0)  # of kernels whose time is fitted as two terms
_LEANING = 0.05  # of one factor on another: what a squared relative error of 0.05 weighs
_LEAST_SHARE = 0.05  # of an interpolated time, where the entries agree better by chance
_LEAST_S = 1e-9
_MOST_LEFT_OUT = 48
_LEAST_LEFT_OUT = 4
_QUANTILE = 0.8
UNKNOWN_SHARE = math.log(1.5)  # of a lone entry in a table that has no other (assumed)
_NUM_AKIN = 12
_TRANSCENDENTAL = frozenset(
    (
        *("tanh", "gelu", "silu", "mish", "sigmoid", "exp", "expm1", "log", "log1p", "erf", "sin"),
        *("cos", "softplus", "logsumexp", "_softmax", "_log_softmax", "logit", "elu", "selu"),
    )
)
_TENSOR = re.compile(r"(\w+)\[[\dx]*\](/[\dx]+)?")
_FRACTION = re.compile(r"(?<![\w.])-?(?:\d+\.[\d.]*(?:e[+-]?\d+)?|\d+e[+-]?\d+|inf)")
_WHOLE = re.compile(r"(?<![\w.])-?\d+")


@dataclass(frozen=True)
class Estimate:
    """A time and the logarithm of the factor by which it may be off, below and above."""

    seconds: float
    below: float
    above: float

    def at_least(self, share: float) -> "Estimate":
        """The same, as uncertain as that or more."""
        return Estimate(self.seconds, max(self.below, share), max(self.above, share))


@dataclass(frozen=True)
class Base:
    """What times are compared with: a roofline, so many times, and a cost of each piece."""

    device: Device
    factor: float = 1.0
    piece_s: float = 0.0

    def seconds(self, cost: Cost) -> float:
        """Of a cost, never 0."""
        in_pieces_s = self.piece_s * cost.pieces
        return max(self.factor * roofline_s(cost, self.device) + in_pieces_s, _LEAST_S)


@dataclass(frozen=True)
class Family:
    """Entries that predict each other. base: what they are a multiple of."""

    entries: Sequence[Entry]
    base: Base

    @cached_property
    def variants(self) -> dict[str, list["_Placed"]]:
        """Entries by variant, with what interpolation asks of them."""
        found: dict[str, list[_Placed]] = {}
        for entry in self.entries:
            found.setdefault(variant_of(entry.key), []).append(_placed(entry, self.base))
        return found

    @cached_property
    def is_in_pieces(self) -> bool:
        """Whether the kernel works in pieces, as far as its entries know."""
        return any(each.pieces for each in self.entries)

    @cached_property
    def spread(self) -> float | None:
        """By how much an entry is off that is predicted from the others: logarithm, 8 of 10.

        None where there are too few to say.
        """
        step = max(1, len(self.entries) // _MOST_LEFT_OUT)
        off = [
            abs(found.log_ratio - each.log_ratio)
            for name, same in self.variants.items()
            for each in same[::step]
            if (found := self._near(name, each.place, without=each)) is not None
        ]
        return quantile(off, _QUANTILE) if len(off) >= _LEAST_LEFT_OUT else None

    def estimate(self, key: str, cost: Cost, pooled_spread: float | None) -> Estimate | None:
        """The time of an operator of this family; None where every entry is far.

        pooled_spread: of all families of the table, for one with few entries.
        """
        near = self._near(variant_of(key), _place(cost.sizes or (), cost.flops, cost.bytes))
        if near is None:
            return None
        spread = self.spread if self.spread is not None else pooled_spread
        share = max(UNKNOWN_SHARE if spread is None else spread, _LEAST_SHARE)
        return Estimate(self.base.seconds(cost) * math.exp(near.log_ratio), share, share)

    def _near(
        self, variant: str, place: tuple[float, ...], without: "_Placed | None" = None
    ) -> "_Near | None":
        far = _FAR_IN_PIECES if self.is_in_pieces else _FAR
        same = _nearest(self.variants.get(variant, ()), place, far, without)
        if same is not None:
            return same
        every = [each for group in self.variants.values() for each in group]
        return _nearest(every, place, far, without)


@dataclass(frozen=True)
class Akin:
    """Entries of any operator that are like one without a family: efficiency by class.

    Classes: products of one dtype, attention, pointwise with and without transcendentals.
    """

    device: Device
    groups: dict[tuple[str, str], list["_Placed"]] = field(
        default_factory=dict[tuple[str, str], list["_Placed"]]
    )

    def add(self, entry: Entry) -> None:
        """Take an entry in."""
        group = _group(entry.operator, cost_of_entry(entry))
        self.groups.setdefault(group, []).append(_placed(entry, Base(self.device)))

    def estimate(self, operator: str, cost: Cost) -> Estimate | None:
        """Roofline times the median ratio of the entries nearest in bytes; None if none is akin.

        The interval holds 8 of 10 of these entries.
        """
        amount = math.log(max(cost.bytes, 1))
        akin = sorted(
            (abs(math.log(max(each.entry.bytes, 1)) - amount), each.log_ratio)
            for each in self.groups.get(_group(operator, cost), ())
        )
        ratios = [ratio for _, ratio in akin[:_NUM_AKIN]]
        if len(ratios) < _LEAST_LEFT_OUT:
            return None
        middle = quantile(ratios, 0.5)
        return Estimate(
            roofline_s(cost, self.device) * math.exp(middle),
            max(middle - quantile(ratios, 0.1), UNKNOWN_SHARE),
            max(quantile(ratios, 0.9) - middle, UNKNOWN_SHARE),
        )


@lru_cache(maxsize=2**14)
def variant_of(key: str) -> str:
    """A key without sizes: dtypes, which operands are strided, and which constants are there."""
    operator, _, operands = key.partition("(")
    operands = _TENSOR.sub(lambda found: found[1] + ("/" if found[2] else ""), operands)
    return f"{operator}({_WHOLE.sub('n', _FRACTION.sub('x', operands))}"


def roofline_s(cost: Cost, device: Device) -> float:
    """Time of a cost on a device, never 0."""
    return max(operation_s(cost, device), _LEAST_S)


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of all lies, between the two nearest."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class _Placed:
    entry: Entry
    place: tuple[float, ...]
    log_ratio: float


@dataclass(frozen=True)
class _Near:
    gap: float
    log_ratio: float


def bases_of(entries: Sequence[Entry], device: Device) -> dict[str, Base]:
    """What times of kernels that work in pieces are a multiple of, by operator, for one dtype.

    The roofline, so many times, and a cost of each piece, by the least squares of relative errors.
    Entries whose pieces are all alike do not tell one from the other: an operator leans on what
    all of the dtype say, and these on the roofline as it is.
    """
    points: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for each in entries:
        roofline = roofline_s(cost_of_entry(each), device) / each.seconds
        same = points.setdefault(each.operator, {}).setdefault(variant_of(each.key), [])
        same.append((each.pieces / each.seconds, roofline))
    groups = {name: list(variants.values()) for name, variants in points.items()}
    shared = _factor([same for each in groups.values() for same in each], towards=1.0)
    found: dict[str, Base] = {}
    for name, variants in groups.items():
        factor = _factor(variants, towards=shared)
        every = [point for same in variants for point in same]
        piece_s = sum(x * (1 - factor * y) for x, y in every) / sum(x * x for x, _ in every)
        found[name] = Base(device, factor, max(piece_s, 0.0))
    return found


def _factor(groups: Sequence[Sequence[tuple[float, float]]], towards: float) -> float:
    """The factor of the roofline if each group has the cost of a piece that fits it best."""
    above, below = _LEANING * towards, _LEANING
    for points in groups:
        squares = sum(x * x for x, _ in points)
        of_one = sum(x for x, _ in points) / squares
        of_roofline = sum(x * y for x, y in points) / squares
        for x, y in points:
            left = y - x * of_roofline
            above += left * (1 - x * of_one)
            below += left * left
    return max(above / below, 0.0)


def _placed(entry: Entry, base: Base) -> _Placed:
    ratio = math.log(entry.seconds / base.seconds(cost_of_entry(entry)))
    return _Placed(entry, _place(entry.sizes, entry.flops, entry.bytes), ratio)


def _nearest(
    entries: Sequence[_Placed], place: tuple[float, ...], far: float, without: _Placed | None
) -> _Near | None:
    """The ratio at a place: a mean of the nearest, weighted by 1 / (gap + 0.05)^2."""
    near = sorted(
        (max((abs(x - y) for x, y in zip(place, each.place, strict=True)), default=0.0), i)
        for i, each in enumerate(entries)
        if each is not without and len(each.place) == len(place)
    )[:_NUM_NEIGHBOURS]
    if not near or near[0][0] > far:
        return None
    weights = [1 / (gap + 0.05) ** 2 for gap, _ in near]
    ratios = [entries[i].log_ratio for _, i in near]
    mean = sum(w * x for w, x in zip(weights, ratios, strict=True)) / sum(weights)
    return _Near(near[0][0], mean)


def _place(sizes: tuple[int, ...], flops: int, num_bytes: int) -> tuple[float, ...]:
    """Where a cost lies among the others of its family: logarithms of what it does."""
    return tuple(math.log(max(x, 1)) for x in (*sizes, flops, num_bytes) if x)


def _group(operator: str, cost: Cost) -> tuple[str, str]:
    if cost.kind is not Kind.MEMORY:
        return (cost.kind.value, str(cost.dtype))
    name = operator.partition(".")[2].partition(".")[0].rstrip("_").removesuffix("_backward")
    is_hard = name.removesuffix("_backward_data") in _TRANSCENDENTAL
    return (cost.kind.value, "transcendental" if is_hard else "")
