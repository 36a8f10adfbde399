"""Measure a schedule: run it, and note when each operator began and how long it took."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from plait.cost.timeline import Event, Stream, Timeline
from plait.executor.observe import Lookout, Sighting, tensors_in
from plait.executor.outcome import Outcome, outcome_of
from plait.executor.run import Runnable
from plait.graph.schedule import OBJECT, PYTHON, Program, Schedule, Step, resolve

_COMMUNICATION = ("_c10d_functional.", "c10d_functional.", "c10d.", "symm_mem.")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A measured run: what it gave, and when.

    overhead_s: what observing added to the whole run, estimated as the number of steps times the
    cost of observing one; a small part of it lies inside of the measured durations.
    """

    outcome: Outcome
    timeline: Timeline
    overhead_s: float

    def __str__(self) -> str:
        """The table of operators, and what measuring cost."""
        return f"{self.timeline}\nmeasuring added about {self.overhead_s * 1e3:.3f} ms"


def profile(
    schedule: Schedule,
    *inputs: Tensor,
    tangents: Sequence[Tensor] | None = None,
    num_warm_ups: int = 1,
) -> Profile:
    """Run forward, and backward if the schedule has one, and measure each operator.

    inputs as for `Runnable`; tangents: for the outputs that require gradients, ones if None. The
    result is that of a run that nobody measures, bit for bit; warm-ups run on copies and leave the
    random state as it is.

    On a GPU the clock is that of its events, and the host does not wait until the run has ended.
    The time of a collective is that of its launch; waiting for it is an event of its own.
    """
    devices = sorted({x.device.index for x in inputs if x.device.type == "cuda"})
    for _ in range(num_warm_ups):
        with torch.random.fork_rng(devices=devices):
            copies = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
            outcome_of(Runnable(schedule), copies, tangents=tangents)
    clock = _DeviceClock() if devices else _HostClock()
    profiler = _Profiler(schedule, clock)
    runnable = Runnable(schedule, profiler)
    clock.start()
    outcome = outcome_of(runnable, inputs, tangents=tangents)
    timeline = Timeline(tuple(profiler.events()))
    overhead_s = len(timeline.events) * _cost_of_a_step_s(schedule)
    return Profile(outcome=outcome, timeline=timeline, overhead_s=overhead_s)


class _Clock(Protocol):
    def start(self) -> None: ...

    def now(self) -> object: ...

    def seconds(self, mark: object) -> float:
        """Since the start; may wait for the device."""
        ...


class _HostClock:
    def start(self) -> None:
        self.started_s = time.perf_counter()

    def now(self) -> object:
        return time.perf_counter()

    def seconds(self, mark: object) -> float:
        assert isinstance(mark, float)
        return mark - self.started_s


class _DeviceClock:
    """Events in the stream: marks cost a launch, and are read when all is done."""

    def start(self) -> None:
        torch.cuda.synchronize()
        self.started = self.now()
        self.is_done = False

    def now(self) -> torch.cuda.Event:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def seconds(self, mark: object) -> float:
        assert isinstance(mark, torch.cuda.Event)
        if not self.is_done:
            torch.cuda.synchronize()
            self.is_done = True
        return self.started.elapsed_time(mark) / 1e3


@dataclass
class _Measured:
    event: Event  # with times still to be filled in
    began: object
    ended: object


@dataclass
class _Profiler:
    """An observer. The clock is read last before a step, and first after it."""

    schedule: Schedule
    clock: _Clock
    measured: list[_Measured] = field(default_factory=list[_Measured])

    def __post_init__(self) -> None:
        self.lookout = Lookout(self.schedule, [self.note])
        self.began: object = None
        self.ended: object = None

    def before(self, program: Program, step: Step, operands: tuple[object, ...]) -> None:
        self.lookout.before(program, step, operands)
        self.began = self.clock.now()

    def after(self, program: Program, step: Step, value: object) -> None:
        self.ended = self.clock.now()
        self.lookout.after(program, step, value)

    def note(self, sighting: Sighting) -> None:
        place = sighting.place
        if not place.is_operator:
            return
        moves = _moves_data(place.step.target)
        event = Event(
            name=place.step.name,
            operator=place.step.target,
            program=place.program,
            calls=place.calls,
            stream=stream_of(place.step.target),
            start_s=0.0,
            duration_s=0.0,
            bytes_read=_num_bytes(list(sighting.operands.values())) if moves else 0,
            bytes_written=_num_bytes(sighting.value) if moves else 0,
            source=place.step.source,
        )
        self.measured.append(_Measured(event, self.began, self.ended))

    def events(self) -> list[Event]:
        seconds = self.clock.seconds
        return [
            _timed(each.event, seconds(each.began), seconds(each.ended)) for each in self.measured
        ]


def stream_of(operator: str) -> Stream:
    """The stream on which an operator of this name runs."""
    return Stream.COMMUNICATION if operator.startswith(_COMMUNICATION) else Stream.COMPUTE


def _timed(event: Event, start_s: float, end_s: float) -> Event:
    return Event(**{**vars(event), "start_s": start_s, "duration_s": end_s - start_s})


def _moves_data(operator: str) -> bool:
    """Whether it reads and writes elements: a view, or a product of sizes, does not."""
    if operator.startswith(PYTHON):
        return False
    return operator.startswith(OBJECT) or not getattr(resolve(operator), "is_view", False)


def _num_bytes(value: object) -> int:
    """Size of the tensors, each once; an expanded one counts what it has in memory."""
    tensors = {id(x): x for x in tensors_in(value)}.values()
    return sum(
        min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
        for x in tensors
        if x.layout is torch.strided
    )


def _cost_of_a_step_s(schedule: Schedule) -> float:
    """Median time that an observer takes for a step that does nothing."""
    program = next(iter(schedule.programs.values()))
    step = Step(name="nothing", target="aten.relu.default")
    alone = Program(name=program.name, inputs=(), results=(), steps=(step,))
    profiler = _Profiler(schedule, _HostClock())
    value = torch.zeros(1)
    times_s = [_time_of(lambda: _observe(profiler, alone, step, value)) for _ in range(101)]
    return sorted(times_s)[len(times_s) // 2]


def _observe(profiler: _Profiler, program: Program, step: Step, value: object) -> None:
    profiler.before(program, step, ())
    profiler.after(program, step, value)


def _time_of(action: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s
