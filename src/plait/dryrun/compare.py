"""A prediction beside a measurement: the error of each kind of memory, operator and stream.

Both are JSON as `plait price --json` writes it; a measurement may hold only some of the figures.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from plait.errors import PlanError

_SCALARS = ("step_s", "compute_s", "communication_s", "exposed_s", "tokens_per_s")
_TABLES = ("parts_s", "operators_s", "streams_s", "programs_s")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One figure in both: in seconds or bytes. error: (predicted - measured) / measured."""

    group: str
    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative; infinite where nothing was measured and something predicted."""
        if not self.measured:
            return float("inf") if self.predicted else 0.0
        return self.predicted / self.measured - 1


def compare(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Difference]:
    """Find what both have. Raises PlanError if that is nothing."""
    found: list[Difference] = []
    for name in _SCALARS:
        if name in predicted and name in measured:
            found.append(_difference("step", name, predicted[name], measured[name]))
    for group in _TABLES:
        found += _shared(group, predicted.get(group), measured.get(group))
    for group in ("memory", "first_memory"):
        ours, theirs = _mapping(predicted.get(group)), _mapping(measured.get(group))
        if "peak_bytes" in ours and "peak_bytes" in theirs:
            found.append(_difference(group, "peak", ours["peak_bytes"], theirs["peak_bytes"]))
        found += _shared(group, ours.get("by_kind"), theirs.get("by_kind"))
    found += _classes(predicted.get("classes"), measured.get("classes"))
    if not found:
        raise PlanError(
            "the two have no figure in common. Both must be JSON of `plait price --json`, or hold "
            f"some of its fields: {', '.join((*_SCALARS, *_TABLES, 'memory'))}."
        )
    return found


def load_figures(path: Path) -> Mapping[str, Any]:
    """Read a file. Raises PlanError if it is no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"{path} is not JSON: {error}.") from error
    if not isinstance(data, Mapping):
        raise PlanError(f"{path} holds a {type(data).__name__}, not an object of figures.")
    return cast("Mapping[str, Any]", data)


def to_text(differences: list[Difference]) -> str:
    """A table: predicted, measured, error."""
    lines = [f"{'':<44}{'predicted':>14}{'measured':>14}{'error':>10}"]
    group = ""
    for each in differences:
        if each.group != group:
            group = each.group
            lines.append(group)
        unit = 2**20 if "memory" in each.group else 1 if each.name == "tokens_per_s" else 1e-3
        lines.append(
            f"  {each.name[:40]:<42}{each.predicted / unit:>14.3f}{each.measured / unit:>14.3f}"
            f"{each.error:>+10.2%}"
        )
    return "\n".join([*lines, "times in ms, memory in MiB"])


def _shared(group: str, predicted: object, measured: object) -> list[Difference]:
    """Every name of either; what one does not have is 0 there."""
    ours, theirs = _mapping(predicted), _mapping(measured)
    if not ours or not theirs:
        return []
    names = list(dict.fromkeys([*theirs, *ours]))
    return [_difference(group, name, ours.get(name, 0), theirs.get(name, 0)) for name in names]


def _classes(predicted: object, measured: object) -> list[Difference]:
    """Memory of the ranks of a large job that are of one class in both."""
    theirs = {_ranks_of(each): each for each in _mappings(measured)}
    found: list[Difference] = []
    for ours in _mappings(predicted):
        other = theirs.get(_ranks_of(ours))
        if other is None:
            continue
        group = f"memory of pipeline rank {_ranks_of(ours)}"
        if "peak_bytes" in ours and "peak_bytes" in other:
            found.append(_difference(group, "peak", ours["peak_bytes"], other["peak_bytes"]))
        found += _shared(group, ours.get("ledger_bytes"), other.get("ledger_bytes"))
    return found


def _ranks_of(one: Mapping[str, Any]) -> str:
    ranks = one.get("pipeline_ranks")
    return ", ".join(map(str, cast("list[object]", ranks))) if isinstance(ranks, list) else "?"


def _mappings(x: object) -> list[Mapping[str, Any]]:
    items = cast("list[object]", x) if isinstance(x, list) else []
    return [_mapping(each) for each in items]


def _mapping(x: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", x) if isinstance(x, Mapping) else {}


def _difference(group: str, name: str, predicted: Any, measured: Any) -> Difference:
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in (predicted, measured)):
        raise PlanError(
            f"{group}, {name}: {predicted!r} and {measured!r} are not both finite numbers."
        )
    return Difference(group=group, name=name, predicted=float(predicted), measured=float(measured))
