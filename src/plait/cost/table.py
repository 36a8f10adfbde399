"""Measured times of operators: looked up, interpolated inside a family, else by the roofline.

A table is data: JSON, made by `plait calibrate` on the machine that it speaks of. An entry's key is
the operator with the forms and constants that it was given. What was not measured is estimated from
what was (`interpolate.py`).
"""

import json
import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from plait.cost.clusters import Cluster, Device
from plait.cost.interpolate import UNKNOWN_SHARE, Akin, Base, Estimate, Family, bases_of, quantile
from plait.cost.operations import Cost, Kind, operation_s
from plait.cost.table_entry import Entry
from plait.cost.table_figures import (
    device_of,
    entry_of,
    factors_by_name,
    launch,
    not_negative,
    positive,
    spread,
    times_by_name,
)
from plait.errors import PlanError

FORMAT = 5
_ROOFLINE_LOW, _ROOFLINE_HIGH = 0.7, 1.5
"""How far a roofline time may be off, without a measurement (assumed)."""
_LEAST_SPREAD = 0.03  # of a measurement between two runs, even where a few samples agree better
_POOLED = 0.8


class Source(StrEnum):
    """Where a predicted time comes from."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    ROOFLINE = "roofline"


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A predicted time and its interval, in seconds: 8 of 10 runs should lie in it."""

    seconds: float
    low_s: float
    high_s: float
    source: Source

    def times(self, factor: float) -> "Duration":
        """So many times as long."""
        return Duration(
            seconds=self.seconds * factor,
            low_s=self.low_s * factor,
            high_s=self.high_s * factor,
            source=self.source,
        )


@dataclass(frozen=True)
class Table:
    """What was measured on a device. launch_s: what the host needs beside each operator.

    device: the figures fitted to all entries, for what has no family. step_low, step_high: the 10th
    and 90th percentile of single steps of calibration that nobody observed, over their median: how
    the machine itself changes, which is common to all operators. program_spread: by how much the
    steps of a measured program are off that is predicted from the others (logarithm, 8 of 10):
    caches are as warm as a program leaves them, and no entry knows of that. 0 of few programs.
    repeated: by kind of operator, how long one takes in a micro-batch behind the first, over its
    time in the first: weights are in the caches then, and freed memory is at hand. message_s: what
    a message takes in a step beside its time alone, as the last rank is waited for.
    """

    machine: str
    entries: tuple[Entry, ...]
    device: Device
    launch_s: float = 0.0
    views_s: dict[str, float] = field(default_factory=dict[str, float])
    step_low: float = 1.0
    step_high: float = 1.0
    program_spread: float = 0.0
    repeated: dict[str, float] = field(default_factory=dict[str, float])
    message_s: float = 0.0

    @cached_property
    def known(self) -> dict[str, Entry]:
        """Entries by key."""
        return {entry.key: entry for entry in self.entries}

    @cached_property
    def families(self) -> dict[tuple[str, str], Family]:
        """Entries by operator and dtype."""
        found: dict[tuple[str, str], list[Entry]] = {}
        in_pieces: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault((entry.operator, entry.dtype), []).append(entry)
            if entry.pieces:
                in_pieces.setdefault(entry.dtype, []).append(entry)
        bases = {
            (operator, dtype): base
            for dtype, entries in in_pieces.items()
            for operator, base in bases_of(entries, self.device).items()
        }
        plain = Base(self.device)
        return {name: Family(entries, bases.get(name, plain)) for name, entries in found.items()}

    @cached_property
    def akin(self) -> Akin:
        """Entries by class, for operators without a family."""
        found = Akin(self.device)
        for entry in self.entries:
            found.add(entry)
        return found

    @cached_property
    def spread(self) -> float | None:
        """That of most families, for those with few entries."""
        known = [each.spread for each in self.families.values() if each.spread is not None]
        return quantile(known, _POOLED) if known else None

    def duration(
        self, operator: str, key: str, cost: Cost, *, is_repeated: bool = False
    ) -> Duration:
        """Predict the time of an operator. is_repeated: in a micro-batch behind the first."""
        found = self._duration(operator, key, cost)
        factor = self.repeated.get(cost.kind.value, 1.0) if is_repeated else 1.0
        return found if factor == 1 else found.times(factor)

    def _duration(self, operator: str, key: str, cost: Cost) -> Duration:
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
        family = self.families.get((operator, str(cost.dtype)))
        near = None if family is None else family.estimate(key, cost, self.spread)
        if near is not None:
            return _duration(near, Source.INTERPOLATED)
        # What an operator reaches of a roofline says more in another dtype than of other operators.
        for (name, _), other in self.families.items():
            near = other.estimate(key, cost, self.spread) if name == operator else None
            if near is not None:
                return _duration(near.at_least(UNKNOWN_SHARE), Source.ROOFLINE)
        akin = self.akin.estimate(operator, cost)
        return roofline(cost, self.device) if akin is None else _duration(akin, Source.ROOFLINE)

    def check_device(self, cluster: Cluster) -> None:
        """Raise PlanError if it was measured on another device than the cluster's."""
        if self.device.name != cluster.device.name:
            raise PlanError(
                f"the table was measured on {self.device.name}, and the cluster {cluster.name} is "
                f"of {cluster.device.name}. Calibrate there, or leave the table out."
            )

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
            "step_low": self.step_low,
            "step_high": self.step_high,
            "program_spread": self.program_spread,
            "repeated": self.repeated,
            "message_s": self.message_s,
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
                    f"the table has format {data['format']}, this Plait reads {FORMAT}. "
                    "Run plait calibrate again."
                )
            entries = tuple(entry_of(x) for x in data["entries"])
            table = cls(
                str(data["machine"]),
                entries,
                device_of(data["device"]),
                launch(data["launch_s"], entries),
                times_by_name(data["views_s"], "views_s"),
                positive(data["step_low"], "step_low"),
                positive(data["step_high"], "step_high"),
                spread(data["program_spread"], "program_spread"),
                {
                    Kind(k).value: x
                    for k, x in factors_by_name(data["repeated"], "repeated").items()
                },
                not_negative(data["message_s"], "message_s"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"this is not a table of `plait calibrate`: {error!r}.") from error
        if table.step_low > table.step_high:
            raise PlanError(
                f"the table's step_low is {table.step_low} and its step_high {table.step_high}: "
                "the 10th percentile of steps cannot be above the 90th. Calibrate again."
            )
        return table

    @classmethod
    def load(cls, path: str | Path) -> "Table":
        """Read a file. Raises PlanError that names it, or OSError where there is none."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise PlanError(
                f"{path} is not text: give the JSON that plait calibrate --out wrote."
            ) from None
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def roofline(cost: Cost, device: Device) -> Duration:
    """Predict by arithmetic and bytes alone."""
    seconds = operation_s(cost, device)
    return Duration(
        seconds=seconds,
        low_s=seconds * _ROOFLINE_LOW,
        high_s=seconds * _ROOFLINE_HIGH,
        source=Source.ROOFLINE,
    )


def _duration(found: Estimate, source: Source) -> Duration:
    return Duration(
        seconds=found.seconds,
        low_s=found.seconds * math.exp(-found.below),
        high_s=found.seconds * math.exp(found.above),
        source=source,
    )
