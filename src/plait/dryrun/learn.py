"""A table of times from measured steps: each operator where it ran, in the step that it ran in.

`plait calibrate` profiles steps of a few models; a replay of the same schedules says on which forms
each operator ran, and their costs. So caches are as warm as in a step, and views and the host's own
time are measured too. Messages are no operators: they are priced by themselves, as `nccl-tests`
or a model says, and their time is taken off a step before anything is learnt of it. What they take
in a step beside that, since ranks never arrive at once, is learnt of each message alike.
"""

import math
import statistics
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

from plait.cost.calibrate import fit_device
from plait.cost.clusters import Cluster, Device
from plait.cost.collectives import collective_of, waits
from plait.cost.interpolate import quantile
from plait.cost.nccl_tests import Measured
from plait.cost.operations import Kind
from plait.cost.table import Table
from plait.cost.table_entry import Entry
from plait.cost.timeline import Timeline
from plait.dryrun.forms import Forms, Outcome
from plait.dryrun.price import price
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
    """Profiles of equal steps of a schedule, and times of steps that nobody observed."""

    schedule: Schedule
    timelines: Sequence[Timeline]
    steps_s: Sequence[float]

    def __post_init__(self) -> None:
        """Check that there is something to learn from."""
        if not self.timelines or not self.steps_s:
            raise PlanError("a table needs at least one profiled and one timed step.")


def learn_table(
    machine: str,
    device: Device,
    measured: Sequence[MeasuredSteps],
    *,
    without: Container[str] = frozenset(),
    cluster: Cluster | None = None,
    messages: Sequence[Measured] = (),
) -> Table:
    """Make a table. device: what is assumed of it; its figures are fitted to the measurements.

    without: keys of operators that the table must not know, to see what it makes of them. cluster:
    on which several ranks were measured, and messages: alone, as nccl-tests measures them; without
    a cluster nothing is learnt of messages.
    """
    programs = [_observed(each) for each in measured]
    table = _table(machine, device, programs, without)
    if cluster is not None:
        message_s = _beside_messages_s(table, measured, programs, cluster, messages)
        table = replace(table, message_s=message_s)
    if len(programs) < _LEAST_PROGRAMS:
        return table
    off: list[float] = []
    for i, each in enumerate(programs):
        others = _table(machine, device, [*programs[:i], *programs[i + 1 :]], without)
        off.append(abs(math.log(_step_s(others, each) / each.step_s)))
    return replace(table, program_spread=quantile(off, _QUANTILE))


def launched_in_a_step(schedule: Schedule) -> list[Launched]:
    """What a first step of a schedule launches, on forms."""
    steps = StepReplay(Replay(schedule, Forms(schedule, Workspace())))
    steps.step()
    return steps.replay.launched


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Times of an operator on its forms: in the first micro-batch (or beside all), and behind."""

    outcome: Outcome
    first_s: list[float] = field(default_factory=list[float])
    repeated_s: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, kw_only=True)
class _Observed:
    """A program as it was measured.

    launched: what it launches, how often in a step, and whether behind the first micro-batch.
    samples: by key. launch_s: what a launch takes beside its operator, negative where the
    clock, which each measured operator reads, takes longer. step_s: without its messages, of which
    there are num_messages and which take message_s. relative: single steps that nobody observed,
    over their median.
    """

    launched: Sequence[tuple[Launched, int, bool]]
    samples: Mapping[str, _Sample]
    launch_s: float
    step_s: float
    message_s: float
    num_messages: int
    relative: Sequence[float]


def _observed(measured: MeasuredSteps) -> _Observed:
    """Match what was timed with what a replay launches, by place and by which run it was."""
    times_s: dict[tuple[object, ...], list[list[float]]] = {}
    for i, timeline in enumerate(measured.timelines):
        for event in timeline.events:
            place = (event.program, *(call.step for call in event.calls), event.name)
            runs = times_s.setdefault(place, [[] for _ in measured.timelines])
            runs[i].append(event.duration_s)
    samples: dict[str, _Sample] = {}
    launched: list[tuple[Launched, int, bool]] = []
    whole_s = message_s = 0.0
    number = num_messages = 0
    seen: set[tuple[object, ...]] = set()
    for each in launched_in_a_step(measured.schedule):
        place = (each.program, *(call.step for call in each.calls), each.step.name)
        is_repeated = place in seen
        seen.add(place)
        runs = [run for run in times_s.get(place, ()) if run]
        # Micro-batches behind the second are like it: the replay has two.
        count = max(1, len(runs[0]) - 1) if is_repeated and runs else 1
        found = [x for run in runs for x in (run[1:] if is_repeated else run[:1])]
        if _is_message(each.step.target):
            message_s += count * statistics.median(found or [0.0])
            num_messages += count * (each.outcome.collective is not None)
            continue
        launched.append((each, count, is_repeated))
        if not runs or each.outcome.cost is None:
            continue
        sample = samples.setdefault(each.outcome.key, _Sample(outcome=each.outcome))
        if not found:
            continue
        (sample.repeated_s if is_repeated else sample.first_s).extend(found)
        whole_s += count * statistics.median(found)
        number += count
    if not number:
        raise PlanError("the profiles are of another schedule: no operator is in both.")
    whole_step_s = statistics.median(measured.steps_s)
    step_s = max(whole_step_s - message_s, _LEAST_S)
    return _Observed(
        launched=launched,
        samples=samples,
        launch_s=(step_s - whole_s) / number,
        step_s=step_s,
        message_s=message_s,
        num_messages=num_messages,
        relative=[each / whole_step_s for each in measured.steps_s],
    )


def _beside_messages_s(
    table: Table,
    measured: Sequence[MeasuredSteps],
    programs: Sequence[_Observed],
    cluster: Cluster,
    messages: Sequence[Measured],
) -> float:
    """What a message takes beside what the price says that compute waits for it, in seconds."""
    beside_s, number = 0.0, 0
    for each, program in zip(measured, programs, strict=True):
        if program.num_messages:
            priced = price(each.schedule, cluster, table=table, measured=messages, fragments=False)
            beside_s += program.message_s - priced.exposed_s
            number += program.num_messages
    return max(beside_s / number, 0.0) if number else 0.0


def _is_message(operator: str) -> bool:
    return waits(operator) or collective_of(operator) is not None


def _repeated(programs: Sequence[_Observed], without: Container[str]) -> dict[str, float]:
    """By kind, time behind the first micro-batch over that in it, of the same operators."""
    first: dict[str, float] = {}
    behind: dict[str, float] = {}
    for each in programs:
        for key, sample in each.samples.items():
            cost = sample.outcome.cost
            if key in without or cost is None or not (sample.first_s and sample.repeated_s):
                continue
            kind = cost.kind.value
            calls = len(sample.first_s)
            first[kind] = first.get(kind, 0.0) + calls * statistics.median(sample.first_s)
            behind[kind] = behind.get(kind, 0.0) + calls * statistics.median(sample.repeated_s)
    return {kind: behind[kind] / first[kind] for kind in first if first[kind] and behind[kind]}


def _table(
    machine: str, device: Device, programs: Sequence[_Observed], without: Container[str]
) -> Table:
    repeated = _repeated(programs, without)
    found: dict[str, tuple[Outcome, list[float]]] = {}
    for each in programs:
        for key, sample in each.samples.items():
            cost = sample.outcome.cost
            if key in without or cost is None:
                continue
            factor = repeated.get(cost.kind.value, 1.0)
            # What happens behind the first micro-batch alone (sums of gradients) is known by that.
            seconds = sample.first_s or [x / factor for x in sample.repeated_s]
            found.setdefault(key, (sample.outcome, []))[1].extend(seconds)
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
    # Messages of an unobserved step are known by those of another: the rest is less certain.
    certain = [each for each in programs if not each.message_s] or programs
    return Table(
        machine,
        tuple(entries),
        fit_device(device, samples),
        statistics.median(each.launch_s for each in certain),
        views,
        step_low=quantile(relative, 0.1),
        step_high=quantile(relative, 0.9),
        repeated=repeated,
    )


def _step_s(table: Table, program: _Observed) -> float:
    """What a table makes of a program that it may not know."""
    whole_s = 0.0
    for each, count, is_repeated in program.launched:
        cost = each.outcome.cost
        if cost is not None:
            key = each.outcome.key
            found = table.duration(each.step.target, key, cost, is_repeated=is_repeated)
            whole_s += count * max(found.seconds + table.launch_s, 0.0)
    return whole_s


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
        pieces=cost.pieces,
    )
