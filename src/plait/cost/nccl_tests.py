"""Measured times of collectives, from what nccl-tests prints or from a CSV.

The text is the table of `all_reduce_perf` and its siblings [github.com/NVIDIA/nccl-tests, doc/
PERFORMANCE.md]: size in bytes, elements, type, operation, root, then time in us, algbw, busbw and
errors out of place, and again in place. The CSV has the columns collective, num_ranks,
ranks_per_node, num_bytes, time_us. Sizes are those of the larger side, as in `collectives.py`.
"""

import csv
import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from plait.cost.collectives import Collective
from plait.errors import PlanError

_PROGRAMS: Mapping[str, Collective] = {
    "all_reduce_perf": Collective.ALL_REDUCE,
    "all_gather_perf": Collective.ALL_GATHER,
    "reduce_scatter_perf": Collective.REDUCE_SCATTER,
    "alltoall_perf": Collective.ALL_TO_ALL,
}
_COLUMNS = ("collective", "num_ranks", "ranks_per_node", "num_bytes", "time_us")
_RANK = re.compile(r"^#\s+Rank\s+(\d+).*? on\s+(\S+)\s+device", re.MULTILINE)
_MICROSECONDS_PER_S = 1e6


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One collective on one placement: sizes in bytes, ascending, and times in seconds."""

    collective: Collective
    num_ranks: int
    ranks_per_node: int
    num_bytes: tuple[int, ...]
    durations_s: tuple[float, ...]

    def at(self, num_bytes: float) -> float:
        """Time of a size: on a straight line of logarithms between two that were measured.

        Below the smallest its time, above the largest its bandwidth.
        """
        sizes, times = self.num_bytes, self.durations_s
        if num_bytes <= sizes[0]:
            return times[0]
        if num_bytes >= sizes[-1]:
            return times[-1] * num_bytes / sizes[-1]
        i = bisect_left(sizes, num_bytes)
        low, high = sizes[i - 1], sizes[i]
        share = math.log(num_bytes / low) / math.log(high / low)
        return times[i - 1] * (times[i] / times[i - 1]) ** share


def measured_s(
    runs: Sequence[Measured],
    collective: Collective,
    num_bytes: float,
    num_ranks: int,
    ranks_per_node: int,
) -> float | None:
    """The time in the run of this collective and placement; None if there is none."""
    for run in runs:
        if (run.collective, run.num_ranks, run.ranks_per_node) == (
            collective,
            num_ranks,
            ranks_per_node,
        ):
            return run.at(num_bytes)
    return None


def unmatched(runs: Sequence[Measured], placed: Iterable[tuple[int, int]], whose: str) -> str:
    """Say that no run is of a message that was priced. placed: ranks, and ranks in a node."""
    ours = ", ".join(f"{ranks} ranks, {in_node} in a node" for ranks, in_node in placed)
    theirs = ", ".join(
        f"{run.collective.value} of {run.num_ranks} ranks, {run.ranks_per_node} in a node"
        for run in runs
    )
    return (
        f"no message is one that nccl-tests measured ({theirs}): the {whose}'s are of "
        f"{ours or 'no ranks'}. Measure those."
    )


def read_measured(path: Path) -> list[Measured]:
    """Read a CSV (by its ending) or the text of one run of nccl-tests.

    Raises PlanError that names file and line for what cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PlanError(
            f"{path} is not text: give what a program of nccl-tests printed, or a CSV."
        ) from None
    return _read_csv(path, text) if path.suffix == ".csv" else [_read_text(path, text)]


def _read_csv(path: Path, text: str) -> list[Measured]:
    rows = csv.DictReader(text.splitlines())
    missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
    if missing:
        raise PlanError(
            f"{path}: the first line lacks {', '.join(missing)}; "
            f"it must name {', '.join(_COLUMNS)}."
        )
    found: dict[tuple[Collective, int, int], dict[int, float]] = {}
    for row in rows:
        number = rows.line_num
        try:
            key = Collective(row["collective"]), int(row["num_ranks"]), int(row["ranks_per_node"])
            size, time_us = int(row["num_bytes"]), float(row["time_us"])
        except (ValueError, TypeError) as error:
            known = ", ".join(Collective)
            raise PlanError(
                f"{path}, line {number}: {error}. Give a collective ({known}) and numbers."
            ) from None
        if min(key[1:]) < 1 or size < 0:
            raise PlanError(
                f"{path}, line {number}: num_ranks={key[1]}, ranks_per_node={key[2]} and "
                f"num_bytes={size} count something. Give ranks from 1 and bytes from 0."
            )
        _add(found.setdefault(key, {}), size, time_us, path, number)
    return [_measured(path, *key, times) for key, times in found.items()]


def _read_text(path: Path, text: str) -> Measured:
    program = next((name for name in _PROGRAMS if name in text), None)
    if program is None:
        raise PlanError(
            f"{path}: the text names none of {', '.join(_PROGRAMS)}. Keep the line that starts the "
            "run, or give a CSV."
        )
    hosts = [match[1] for match in _RANK.findall(text)]
    if not hosts:
        raise PlanError(f"{path}: there is no line '#  Rank  0 ... on HOST device ...'.")
    times: dict[int, float] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or not words[0].isdigit():
            continue
        try:
            int(words[4])  # the root: a number of a rank, so no column is missing
            size, time_us = int(words[0]), float(words[5])
        except (ValueError, IndexError):
            raise PlanError(
                f"{path}, line {number}: expected size, count, type, redop, root and time, got "
                f"{line.strip()!r}."
            ) from None
        _add(times, size, time_us, path, number)
    per_node = max(hosts.count(host) for host in hosts)
    return _measured(path, _PROGRAMS[program], len(hosts), per_node, times)


def _add(times: dict[int, float], num_bytes: int, time_us: float, path: Path, number: int) -> None:
    """Note a time. No bytes may take none: such lines say nothing."""
    if not 0 <= time_us < math.inf or (num_bytes and not time_us):
        raise PlanError(
            f"{path}, line {number}: {num_bytes} bytes take {time_us:g} us. Times above zero are "
            "expected, and finite: run nccl-tests again, or leave the line out."
        )
    if num_bytes:
        times[num_bytes] = time_us / _MICROSECONDS_PER_S


def _measured(
    path: Path, collective: Collective, num_ranks: int, per_node: int, times: Mapping[int, float]
) -> Measured:
    if not times:
        raise PlanError(f"{path}: no sizes for {collective.value} of {num_ranks} ranks.")
    ascending = dict(sorted(times.items()))
    return Measured(
        collective=collective,
        num_ranks=num_ranks,
        ranks_per_node=per_node,
        num_bytes=tuple(ascending),
        durations_s=tuple(ascending.values()),
    )
