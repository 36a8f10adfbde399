"""Measured times of operators: looked up, interpolated inside a family, else by the roofline.

A table is data: JSON, made by `plait calibrate` on the machine that it speaks of. An entry's key is
the operator with the forms and constants that it was given; a family is all entries of one operator
and dtype. Between its entries, the ratio of measured time to roofline is interpolated over the
logarithms of sizes; products and attention change it slowly.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from plait.cost.clusters import Device
from plait.cost.operations import Cost, Kind, operation_s
from plait.errors import PlanError

FORMAT = 1
_NUM_NEIGHBOURS = 4
_FAR = math.log(4.0)
"""Sizes that lie further from every entry than four times are not interpolated."""
_ROOFLINE_LOW, _ROOFLINE_HIGH = 0.7, 1.5
"""How far a roofline time may be off, without a measurement (assumed)."""
_LEAST_SPREAD = 0.03  # of a measurement between two runs, even where a few samples agree better


class Source(StrEnum):
    """Where a predicted time comes from."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    ROOFLINE = "roofline"


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A predicted time and its interval, in seconds."""

    seconds: float
    low_s: float
    high_s: float
    source: Source


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One operator on one form: median seconds of its runs and their 10th and 90th percentile."""

    key: str
    operator: str
    seconds: float
    low_s: float
    high_s: float
    flops: int
    bytes: int
    dtype: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Table:
    """What was measured on a device. launch_s: what the host needs beside each operator.

    device: the figures fitted to all entries, for what has no family.
    """

    machine: str
    entries: tuple[Entry, ...]
    device: Device
    launch_s: float = 0.0
    views_s: dict[str, float] = field(default_factory=dict[str, float])

    @cached_property
    def known(self) -> dict[str, Entry]:
        """Entries by key."""
        return {entry.key: entry for entry in self.entries}

    @cached_property
    def families(self) -> dict[tuple[str, str], list[Entry]]:
        """Entries by operator and dtype."""
        found: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            found.setdefault((entry.operator, entry.dtype), []).append(entry)
        return found

    def duration(self, operator: str, key: str, cost: Cost) -> Duration:
        """Predict the time of an operator."""
        known = self.known.get(key)
        if known is not None:
            least = known.seconds * _LEAST_SPREAD
            return Duration(
                seconds=known.seconds,
                low_s=min(known.low_s, known.seconds - least),
                high_s=max(known.high_s, known.seconds + least),
                source=Source.MEASURED,
            )
        if cost.kind is Kind.FREE:
            view_s = self.views_s.get(operator, self.views_s.get("", 0.0))
            return Duration(
                seconds=view_s, low_s=view_s / 2, high_s=view_s * 2, source=Source.INTERPOLATED
            )
        family = self.families.get((operator, str(cost.dtype)), [])
        found = self._interpolated(family, cost) if family else None
        return found or roofline(cost, self.device)

    def _interpolated(self, family: Iterable[Entry], cost: Cost) -> Duration | None:
        here = _place(cost.sizes or (), cost.flops, cost.bytes)
        near: list[tuple[float, float]] = []
        for entry in family:
            there = _place(entry.sizes, entry.flops, entry.bytes)
            if len(there) == len(here):
                gap = max(abs(x - y) for x, y in zip(here, there, strict=True))
                near.append((gap, math.log(entry.seconds / self._base_s(entry))))
        near = sorted(near)[:_NUM_NEIGHBOURS]
        if not near or near[0][0] > _FAR:
            return None
        weights = [1 / (gap + 0.05) ** 2 for gap, _ in near]
        mean = sum(w * x for w, (_, x) in zip(weights, near, strict=True)) / sum(weights)
        spread = max(abs(x - mean) for _, x in near) / 2 + near[0][0] / 10
        seconds = _operation_s(cost, self.device) * math.exp(mean)
        share = math.exp(max(spread, 0.05))
        return Duration(
            seconds=seconds,
            low_s=seconds / share,
            high_s=seconds * share,
            source=Source.INTERPOLATED,
        )

    def _base_s(self, entry: Entry) -> float:
        return _operation_s(cost_of_entry(entry), self.device)

    def to_json(self) -> str:
        """Write it."""
        device = asdict(self.device)
        device["peak_flops_per_s"] = {
            str(dtype): peak for dtype, peak in self.device.peak_flops_per_s.items()
        }
        data = {
            "format": FORMAT,
            "machine": self.machine,
            "launch_s": self.launch_s,
            "views_s": self.views_s,
            "device": device,
            "entries": [asdict(entry) for entry in self.entries],
        }
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """Read what `to_json` wrote. Raises PlanError for anything else."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise PlanError(
                    f"the table has format {data['format']}, this Plait reads {FORMAT}."
                )
            device = dict(data["device"])
            device["peak_flops_per_s"] = {
                _dtype(name): float(peak) for name, peak in device["peak_flops_per_s"].items()
            }
            entries = (_entry(x) for x in data["entries"])
            return cls(
                str(data["machine"]),
                tuple(entries),
                Device(**device),
                float(data["launch_s"]),
                {str(name): float(x) for name, x in data["views_s"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"this is not a table of `plait calibrate`: {error!r}.") from error

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read a file."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def roofline(cost: Cost, device: Device) -> Duration:
    """Predict by arithmetic and bytes alone."""
    seconds = operation_s(cost, device)
    return Duration(
        seconds=seconds,
        low_s=seconds * _ROOFLINE_LOW,
        high_s=seconds * _ROOFLINE_HIGH,
        source=Source.ROOFLINE,
    )


def cost_of_entry(entry: Entry) -> Cost:
    """What the operator of an entry does."""
    kind = Kind.MATRIX if entry.sizes else Kind.ATTENTION if entry.flops else Kind.MEMORY
    return Cost(
        kind=kind,
        bytes=entry.bytes,
        flops=entry.flops,
        dtype=_dtype(entry.dtype),
        sizes=cast("tuple[int, int, int]", entry.sizes) if entry.sizes else None,
    )


def _entry(data: dict[str, Any]) -> Entry:
    given: dict[str, Any] = {**data, "sizes": tuple(data["sizes"])}
    return Entry(**given)


def _operation_s(cost: Cost, device: Device) -> float:
    return max(operation_s(cost, device), 1e-9)


def _place(sizes: tuple[int, ...], flops: int, num_bytes: int) -> tuple[float, ...]:
    """Where a cost lies among the others of its family: logarithms of what it does."""
    return tuple(math.log(max(x, 1)) for x in (*sizes, flops, num_bytes) if x)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise PlanError(f"{name!r} is no dtype of torch.")
    return found
