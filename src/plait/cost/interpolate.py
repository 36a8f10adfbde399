"""Times of operators that were not measured, from entries of a table that are near.

Between entries of one operator and dtype (a family) the ratio of measured time to roofline is
interpolated over the logarithms of sizes. Entries of the same variant (what is constant, strided
and of which dtype among the operands) go first: a mask or a cap may double a kernel's time. How far
this may be off is measured: each entry is predicted from the others.
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
_LEAST_SHARE = 0.05  # of an interpolated time, where the entries agree better by chance
_MOST_LEFT_OUT = 48
_LEAST_LEFT_OUT = 4
_QUANTILE = 0.8
_UNKNOWN_SHARE = math.log(1.5)  # of a lone entry in a table that has no other (assumed)
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


@dataclass(frozen=True)
class Family:
    """Entries that predict each other. device: its roofline is what they are a multiple of."""

    entries: Sequence[Entry]
    device: Device

    @cached_property
    def variants(self) -> dict[str, list["_Placed"]]:
        """Entries by variant, with what interpolation asks of them."""
        found: dict[str, list[_Placed]] = {}
        for entry in self.entries:
            found.setdefault(variant_of(entry.key), []).append(_placed(entry, self.device))
        return found

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
        share = max(_UNKNOWN_SHARE if spread is None else spread, _LEAST_SHARE)
        seconds = roofline_s(cost, self.device) * math.exp(near.log_ratio)
        return Estimate(seconds, share, share)

    def _near(
        self, variant: str, place: tuple[float, ...], without: "_Placed | None" = None
    ) -> "_Near | None":
        same = _nearest(self.variants.get(variant, ()), place, without)
        if same is not None:
            return same
        every = [each for group in self.variants.values() for each in group]
        return _nearest(every, place, without)


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
        self.groups.setdefault(group, []).append(_placed(entry, self.device))

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
            max(middle - quantile(ratios, 0.1), _UNKNOWN_SHARE),
            max(quantile(ratios, 0.9) - middle, _UNKNOWN_SHARE),
        )


@lru_cache(maxsize=2**14)
def variant_of(key: str) -> str:
    """A key without sizes: dtypes, which operands are strided, and which constants are there."""
    operator, _, operands = key.partition("(")
    operands = _TENSOR.sub(lambda found: found[1] + ("/" if found[2] else ""), operands)
    return f"{operator}({_WHOLE.sub('n', _FRACTION.sub('x', operands))}"


def roofline_s(cost: Cost, device: Device) -> float:
    """Time of a cost on a device, never 0."""
    return max(operation_s(cost, device), 1e-9)


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


def _placed(entry: Entry, device: Device) -> _Placed:
    ratio = math.log(entry.seconds / roofline_s(cost_of_entry(entry), device))
    return _Placed(entry, _place(entry.sizes, entry.flops, entry.bytes), ratio)


def _nearest(
    entries: Sequence[_Placed], place: tuple[float, ...], without: _Placed | None
) -> _Near | None:
    """The ratio at a place: a mean of the nearest, weighted by 1 / (gap + 0.05)^2."""
    near = sorted(
        (max((abs(x - y) for x, y in zip(place, each.place, strict=True)), default=0.0), i)
        for i, each in enumerate(entries)
        if each is not without and len(each.place) == len(place)
    )[:_NUM_NEIGHBOURS]
    if not near or near[0][0] > _FAR:
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
