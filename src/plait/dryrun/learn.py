"""A table of times from measured steps: each operator where it ran, in the step that it ran in.

`plait calibrate` profiles steps of a few models; a replay of the same schedules says on which forms
each operator ran, and their costs. So caches are as warm as in a step, and views and the host's own
time are measured too.
"""

import math
import statistics
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

from plait.cost.calibrate import fit_device
from plait.cost.clusters import Device
from plait.cost.interpolate import quantile
from plait.cost.operations import Kind
from plait.cost.table import Table
from plait.cost.table_entry import Entry
from plait.cost.timeline import Timeline
from plait.dryrun.forms import Forms, Outcome
from plait.dryrun.replay import Launched, Replay
from plait.dryrun.replay_step import StepReplay
from plait.dryrun.workspace import Workspace
from plait.errors import PlanError
from plait.graph.schedule import Schedule

_LEAST_S = 1e-9
_LEAST_PROGRAMS = 4
"""Programs of which each is predicted from the others, to see how far a table is off."""
_QUANTILE = 0.8


@dataclass(frozen=True, kw_only=True)
class MeasuredSteps:
    """Profiles of equal steps of a schedule with one micro-batch, and times of steps unobserved."""

    schedule: Schedule
    timelines: Sequence[Timeline]
    steps_s: Sequence[float]

    def __post_init__(self) -> None:
        """Check that there is something to learn from."""
        if not self.timelines or not self.steps_s:
            raise PlanError("a table needs at least one profiled and one timed step.")
        if self.schedule.num_micro_batches != 1:
            raise PlanError("measure steps of one micro-batch: places are told apart by name.")


def learn_table(
    machine: str,
    device: Device,
    measured: Sequence[MeasuredSteps],
    *,
    without: Container[str] = frozenset(),
) -> Table:
    """Make a table. device: what is assumed of it; its figures are fitted to the measurements.

    without: keys of operators that the table must not know, to see what it makes of them.
    """
    programs = [_observed(each) for each in measured]
    table = _table(machine, device, programs, without)
    if len(programs) < _LEAST_PROGRAMS:
        return table
    off: list[float] = []
    for i, each in enumerate(programs):
        others = _table(machine, device, [*programs[:i], *programs[i + 1 :]], without)
        off.append(abs(math.log(_step_s(others, each) / each.step_s)))
    return replace(table, program_spread=quantile(off, _QUANTILE))


def launched_in_a_step(schedule: Schedule) -> list[Launched]:
    """What a first step of a schedule launches, on forms."""
    steps = StepReplay(Replay(schedule, Forms(schedule.objects, Workspace())))
    steps.step()
    return steps.replay.launched


@dataclass(frozen=True, kw_only=True)
class _Observed:
    """A program as it was measured.

    samples: of each operator and its forms, by key. launch_s: what a launch takes beside its
    operator, negative where the clock, which each measured operator reads, takes longer. relative:
    single steps that nobody observed, over their median step_s.
    """

    launched: Sequence[Launched]
    samples: Mapping[str, tuple[Outcome, list[float]]]
    launch_s: float
    step_s: float
    relative: Sequence[float]


def _observed(measured: MeasuredSteps) -> _Observed:
    times_s: dict[tuple[object, ...], list[float]] = {}
    for timeline in measured.timelines:
        for event in timeline.events:
            place = (event.program, *(call.step for call in event.calls), event.name)
            times_s.setdefault(place, []).append(event.duration_s)
    found: dict[str, tuple[Outcome, list[float]]] = {}
    whole_s, count = 0.0, 0
    launched = launched_in_a_step(measured.schedule)
    for each in launched:
        place = (each.program, *(call.step for call in each.calls), each.step.name)
        if place not in times_s or each.outcome.cost is None:
            continue
        whole_s += statistics.median(times_s[place])
        count += 1
        found.setdefault(each.outcome.key, (each.outcome, []))[1].extend(times_s[place])
    if not count:
        raise PlanError("the profiles are of another schedule: no operator is in both.")
    step_s = statistics.median(measured.steps_s)
    return _Observed(
        launched=launched,
        samples=found,
        launch_s=(step_s - whole_s) / count,
        step_s=step_s,
        relative=[each / step_s for each in measured.steps_s],
    )


def _table(
    machine: str, device: Device, programs: Sequence[_Observed], without: Container[str]
) -> Table:
    found: dict[str, tuple[Outcome, list[float]]] = {}
    for each in programs:
        for key, (outcome, seconds) in each.samples.items():
            if key not in without:
                found.setdefault(key, (outcome, []))[1].extend(seconds)
    entries: list[Entry] = []
    samples = []
    views_s: dict[str, list[float]] = {}
    for key, (outcome, seconds) in found.items():
        cost = outcome.cost
        assert cost is not None
        if cost.kind is Kind.FREE:
            views_s.setdefault(outcome.target, []).extend(seconds)
            continue
        samples.append((cost, statistics.median(seconds)))
        entries.append(_entry(key, outcome, seconds))
    every_view_s = [x for times_s in views_s.values() for x in times_s]
    views = {name: statistics.median(times_s) for name, times_s in views_s.items()}
    if every_view_s:
        views[""] = statistics.median(every_view_s)
    relative = [x for each in programs for x in each.relative]
    return Table(
        machine,
        tuple(entries),
        fit_device(device, samples),
        statistics.median(each.launch_s for each in programs),
        views,
        step_low=quantile(relative, 0.1),
        step_high=quantile(relative, 0.9),
    )


def _step_s(table: Table, program: _Observed) -> float:
    """What a table makes of a program that it may not know."""
    return sum(
        max(table.duration(each.step.target, each.outcome.key, cost).seconds + table.launch_s, 0.0)
        for each in program.launched
        if (cost := each.outcome.cost) is not None
    )


def _entry(key: str, outcome: Outcome, seconds: Sequence[float]) -> Entry:
    cost = outcome.cost
    assert cost is not None
    ordered = [max(each, _LEAST_S) for each in sorted(seconds)]
    return Entry(
        key=key,
        operator=outcome.target,
        seconds=statistics.median(ordered),
        low_s=ordered[len(ordered) // 10],
        high_s=ordered[-1 - len(ordered) // 10],
        flops=cost.flops,
        bytes=cost.bytes,
        dtype=str(cost.dtype),
        sizes=cost.sizes or (),
    )
