"""The order of operations of replicas: several priorities are played, and the best is kept.

Replicas go through a piece one behind the other. How far one lags, its skew, counts in stages, each
of which ends with a message. A replica that follows closely finds the weights in the caches, and
keeps little alive; but what it has left to do when a message of the other is sent is all that hides
it. So small skews are tried first, and others only where these expose something.

One skew for a whole piece is not always best: where little can be computed beside a message both
replicas should have sent theirs, and where much can, one of them should be ahead. So the best skew
is tried with a replica a stage earlier or later at each stage.

What nothing waits for (fillers: weight gradients) can wait for a message. But what waits finds its
operands gone from the caches, and keeps them alive. So the best order is tried again with only so
many fillers waiting as the messages need, the nearest before each; others stay in place.

An order is a plan for times that will differ a little. One whose fillers last just as long as their
message exposes what they turn out shorter, so the best few are compared with longer messages too.
"""

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from plait.cost.simulate import (
    COMPUTE,
    FILLER,
    Host,
    Operation,
    Priority,
    Simulation,
    list_schedule,
    longest_paths_s,
    simulate,
)

WITHIN = (0.25, 0.5, 1.0)
"""Shares of a stage that a replica lags behind the one before it, in the same stage."""
SKEWS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""How many stages it lags; with 0 it does a stage when the one before it has done it."""
_SHIFTS = (-1.0, 1.0)
_MOST_STAGES = 32  # of a piece, where each is tried alone
_ENOUGH = 0.02  # of the messages' time: less exposed is not worth another trial
_WAITING = (0.0, 0.5, 1.0, 1.5)
"""Time of the fillers that wait for a message, over that of the message."""
_LONGER = 1.25
"""Messages over what the cost model says, with which orders are compared too."""
_ALL_WAIT, _FEW_WAIT = 1.0, 0.5
"""How much of what a filler pins it reads from memory, not from caches, after it has waited: among
all others, and among few (measured on a CPU: 0.9 and about a half)."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """Where an operation belongs: its replica (None: of all), its place, whether it is a filler."""

    replica: int | None
    place: float
    is_filler: bool = False


@dataclass(frozen=True, kw_only=True)
class _Skew:
    """How many stages each replica lags; first: which leads; shifts: what is added at a stage.

    within: share of a stage that it lags in each, of `WITHIN`. waiting: of `_WAITING`; None, all
    fillers wait. longer: how many times longer messages are taken to be.
    """

    stages: float
    first: int
    within: float = 1.0
    shifts: tuple[tuple[int, float], ...] = ()
    waiting: float | None = None
    longer: float = 1.0


def skewed_schedule(
    operations: Sequence[Operation],
    lanes: Sequence[Lane],
    *,
    host: Host = Host.AHEAD,
    pinned_limit_bytes: int | None = None,
    slowdown: float = 1.0,
    bytes_per_s: float | None = None,
) -> Simulation:
    """The best order of operations, each of its lane. They come after what they depend on.

    host, slowdown: see `simulate`; pinned_limit_bytes: see `list_schedule`. bytes_per_s: at which a
    filler that has waited reads what it pins once more; None, at no cost.
    """
    search = _Search(operations, lanes, host, pinned_limit_bytes, slowdown, bytes_per_s)
    if all(each.stream == COMPUTE for each in operations):
        # There is nothing to hide: every order takes as long, and the program's own frees soonest.
        return search.play(_Skew(stages=0.0, first=0))
    last = max((lane.replica for lane in lanes if lane.replica is not None), default=0)
    for within in WITHIN if last and search.may_hide_all() else ():
        # No filler waits: where such an order hides all, there is nothing left to gain.
        close = search.play(_Skew(stages=0.0, first=0, within=within, waiting=0.0))
        if search.hides_all(close):
            return close
    for stages in SKEWS if last else SKEWS[:1]:
        search.play(_Skew(stages=stages, first=0))
        if last:
            search.play(_Skew(stages=stages, first=last))
    search.play(None)
    if last:
        search.refine()
    return search.best_in_practice()


class _Search:
    def __init__(
        self,
        operations: Sequence[Operation],
        lanes: Sequence[Lane],
        host: Host,
        pinned_limit_bytes: int | None,
        slowdown: float,
        bytes_per_s: float | None,
    ) -> None:
        self.operations, self.lanes, self.host = operations, lanes, host
        self.pinned_limit_bytes, self.slowdown = pinned_limit_bytes, slowdown
        self.bytes_per_s = bytes_per_s
        self.longer = _with_messages(operations, _LONGER)
        self.stages = _stages(operations)
        self.shares = _shares(operations, lanes, self.stages)
        # Only how they compare counts: several skews may let the same operations go first.
        self.tried: dict[tuple[bool, tuple[int, ...]], tuple[Simulation, _Skew | None]] = {}

    def may_hide_all(self) -> bool:
        """Whether there is more to compute than longer messages take."""
        signed_s = (x.duration_s if x.stream == COMPUTE else -x.duration_s for x in self.longer)
        return sum(signed_s) > 0

    def hides_all(self, found: Simulation) -> bool:
        """Whether an order exposes next to nothing, of longer messages neither."""
        slower = simulate(self.longer, found.order, host=self.host, slowdown=self.slowdown)
        return slower.exposed_s < _ENOUGH * slower.communication_s

    def cost_s(self, tried: tuple[Simulation, _Skew | None]) -> float:
        """The time of an order, by the model and with longer messages, and of reading again."""
        found, skew = tried
        slower = simulate(self.longer, found.order, host=self.host, slowdown=self.slowdown)
        mean_s = (found.total_s + slower.total_s) / 2
        if self.bytes_per_s is None:
            return mean_s
        waiting = self.waiting(None if skew is None else skew.waiting)
        pinned_bytes = sum(self.operations[i].pinned_bytes for i in waiting)
        share = _ALL_WAIT if skew is None or skew.waiting is None else _FEW_WAIT
        return mean_s + share * pinned_bytes / self.bytes_per_s

    def waiting(self, share: float | None) -> set[int]:
        """Fillers that wait: those nearest before each message that take that share of its time."""
        fillers = [i for i, lane in enumerate(self.lanes) if lane.is_filler]
        if share is None:
            return set(fillers)
        found: set[int] = set()
        for i in reversed(range(len(self.operations))):
            if self.operations[i].stream == COMPUTE:
                continue
            left_s = share * self.operations[i].duration_s
            before = reversed(fillers[: bisect_left(fillers, i)])
            for near in (k for k in before if k not in found):
                if left_s <= 0:
                    break
                found.add(near)
                left_s -= self.operations[near].duration_s
        return found

    def best_in_practice(self) -> Simulation:
        """Of the best order and others: for longer messages, and in which fewer fillers wait."""
        best = min(self.tried.values(), key=lambda tried: tried[0].total_s)
        skews = [(found, skew) for found, skew in self.tried.values() if skew is not None]
        if not skews or not any(lane.is_filler for lane in self.lanes):
            return best[0]
        _, skew = min(skews, key=lambda tried: tried[0].total_s)
        self.tried.clear()
        for share, longer in itertools.product((*_WAITING, None), (1.0, _LONGER)):
            self.play(replace(skew, waiting=share, longer=longer))
        return min((best, *self.tried.values()), key=self.cost_s)[0]

    def play(self, skew: _Skew | None) -> Simulation:
        """Try a skew, or the critical path first."""
        priority = self.critical() if skew is None else self.by_stage(skew)
        ranked = tuple(sorted(range(len(priority)), key=priority.__getitem__))
        is_longer = skew is not None and skew.longer != 1
        if (is_longer, ranked) in self.tried:
            return self.tried[is_longer, ranked][0]
        found = list_schedule(
            self.longer if is_longer else self.operations,
            priority,
            pinned_limit_bytes=self.pinned_limit_bytes,
            slowdown=self.slowdown,
        )
        if is_longer or self.host is Host.BLOCKING:
            found = simulate(self.operations, found.order, host=self.host, slowdown=self.slowdown)
        self.tried[is_longer, ranked] = found, skew
        return found

    def refine(self) -> None:
        """Go on from the best skew, stage by stage."""
        stages = sorted(set(self.stages))
        if len(stages) > _MOST_STAGES:
            return
        for stage, shift in itertools.product(stages, _SHIFTS):
            skews = [(found, skew) for found, skew in self.tried.values() if skew is not None]
            found, best = min(skews, key=lambda tried: tried[0].total_s)
            if found.exposed_s < _ENOUGH * found.communication_s:
                return
            self.play(replace(best, shifts=(*best.shifts, (stage, shift))))

    def critical(self) -> list[Priority]:
        paths_s = longest_paths_s(self.operations)
        return [
            FILLER if lane.is_filler else (-path_s, float(i))
            for i, (lane, path_s) in enumerate(zip(self.lanes, paths_s, strict=True))
        ]

    def by_stage(self, skew: _Skew) -> list[Priority]:
        shifts = dict(skew.shifts)
        waiting = self.waiting(skew.waiting)
        priorities: list[Priority] = []
        for i, (lane, stage) in enumerate(zip(self.lanes, self.stages, strict=True)):
            if i in waiting:
                priorities.append((*FILLER, lane.place))
                continue
            behind = 0 if lane.replica is None else abs(lane.replica - skew.first)
            lag = (skew.stages + shifts.get(stage, 0.0)) * behind
            share = self.shares[i] + skew.within * behind
            priorities.append((stage + lag, share, behind, lane.place))
        return priorities


def _with_messages(operations: Sequence[Operation], longer: float) -> list[Operation]:
    return [
        each if each.stream == COMPUTE else replace(each, duration_s=each.duration_s * longer)
        for each in operations
    ]


def _shares(
    operations: Sequence[Operation], lanes: Sequence[Lane], stages: Sequence[int]
) -> list[float]:
    """How much of what its replica computes in its stage comes before each operation, below 1.

    What belongs to no replica stands where the first one is in its place.
    """
    places = [(stage, lane.replica or 0) for stage, lane in zip(stages, lanes, strict=True)]
    done_s = dict.fromkeys(places, 0.0)
    before_s = [0.0] * len(operations)
    for i in sorted(range(len(operations)), key=lambda i: lanes[i].place):
        before_s[i] = done_s[places[i]]
        if lanes[i].replica is not None and operations[i].stream == COMPUTE:
            done_s[places[i]] += operations[i].duration_s
    return [
        before / done_s[place] if done_s[place] else 0.0
        for before, place in zip(before_s, places, strict=True)
    ]


def _stages(operations: Sequence[Operation]) -> list[int]:
    """How many messages lie behind each operation, on the longest way."""
    stages = [0] * len(operations)
    for i, each in enumerate(operations):
        for k in each.depends_on:
            stages[i] = max(stages[i], stages[k] + (operations[k].stream != COMPUTE))
    return stages
