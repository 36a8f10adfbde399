"""Measure a schedule: run it, and note when each operator began and how long it took."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from plait.cost.timeline import Event, Stream, Timeline
from plait.executor.observe import Lookout, Sighting, tensors_in
from plait.executor.optimize import Optimizers
from plait.executor.outcome import Outcome, outcome_of
from plait.executor.ranks import groups_of
from plait.executor.run import Runnable, run_loaded
from plait.graph.place import Place
from plait.graph.schedule import (
    ISLAND,
    OBJECT,
    PYTHON,
    Program,
    Schedule,
    Step,
    resolve,
)

_COMMUNICATION = ("_c10d_functional.", "c10d_functional.", "c10d.", "symm_mem.")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A measured run: what it gave, and when.

    overhead_s: the host's time in observing, beside what was measured. The gaps between events are
    mostly that; each duration holds one reading of the clock. started_s: when the timeline starts,
    by time.perf_counter.
    """

    outcome: Outcome
    timeline: Timeline
    overhead_s: float
    started_s: float

    def to_json(self, *, step_s: float | None = None, peak_bytes: int | None = None) -> str:
        """What `plait compare` takes as measured.

        step_s: of steps that nobody observes, in seconds; without it that of this one, which
        observing makes longer. peak_bytes: of such a step, as torch.cuda.max_memory_allocated()
        says on a GPU.
        """
        figures: dict[str, object] = {
            "step_s": self.timeline.duration_s if step_s is None else step_s,
            **self.timeline.figures(),
        }
        if peak_bytes is not None:
            figures["memory"] = {"peak_bytes": peak_bytes}
        return json.dumps(figures)

    def __str__(self) -> str:
        """The table of operators, and what measuring cost."""
        return f"{self.timeline}\nobserving took another {self.overhead_s * 1e3:.3f} ms"


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
    return Profile(
        outcome=outcome,
        timeline=profiler.timeline(),
        overhead_s=profiler.overhead_s,
        started_s=clock.started_s,
    )


def profile_step(
    schedule: Schedule,
    model: nn.Module,
    *inputs: object,
    optimizer: Optimizers = None,
    mesh: DeviceMesh | None = None,
) -> Profile:
    """Measure one `plait.run` of a training step: all micro-batches, and the optimizer's program.

    It is a step like any other: gradients are added, or parameters updated. The outcome holds the
    loss. A first step of an optimizer, which makes its state, shows no program.

    mesh: as of `plait.run`; every rank profiles. A wait for a message lasts until the last rank has
    sent its part.
    """
    on_gpu = any(x.device.type == "cuda" for x in model.parameters())
    clock = _DeviceClock() if on_gpu else _HostClock()
    profiler = _Profiler(schedule, clock)
    runnable = Runnable(schedule, profiler, groups_of(schedule, model, mesh))
    clock.start()
    loss = run_loaded(runnable, model, *inputs, optimizer=optimizer)
    outcome = Outcome(outputs=(loss,) if isinstance(loss, Tensor) else loss, gradients={})
    return Profile(
        outcome=outcome,
        timeline=profiler.timeline(),
        overhead_s=profiler.overhead_s,
        started_s=clock.started_s,
    )


class _Clock(Protocol):
    started_s: float

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
        self.started_s = time.perf_counter()
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
    place: Place
    began: object
    ended: object
    bytes_read: int
    bytes_written: int


@dataclass
class _Profiler:
    """An observer. The clock is read last before a step, and first after it."""

    schedule: Schedule
    clock: _Clock
    measured: list[_Measured] = field(default_factory=list[_Measured])
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        self.lookout = Lookout(self.schedule, [self.note], copies=False)
        self.began: object = None
        self.ended: object = None

    def before(self, program: Program, step: Step, operands: tuple[object, ...]) -> None:
        entered_s = time.perf_counter()
        self.lookout.before(program, step, operands)
        self.overhead_s += time.perf_counter() - entered_s
        self.began = self.clock.now()

    def after(self, program: Program, step: Step, value: object) -> None:
        self.ended = self.clock.now()
        entered_s = time.perf_counter()
        self.lookout.after(program, step, value)
        self.overhead_s += time.perf_counter() - entered_s

    def note(self, sighting: Sighting) -> None:
        if not sighting.place.is_operator:
            return
        bytes_read = bytes_written = 0
        if _moves_data(sighting.place.step.target):
            bytes_read = _num_bytes(list(sighting.operands.values()))
            bytes_written = _num_bytes(sighting.value)
        self.measured.append(
            _Measured(sighting.place, self.began, self.ended, bytes_read, bytes_written)
        )

    def timeline(self) -> Timeline:
        return Timeline(tuple(self._event(each) for each in self.measured))

    def _event(self, each: _Measured) -> Event:
        start_s = self.clock.seconds(each.began)
        return Event(
            name=each.place.step.name,
            operator=each.place.step.target,
            program=each.place.program,
            calls=each.place.calls,
            stream=stream_of(each.place.step.target),
            start_s=start_s,
            duration_s=self.clock.seconds(each.ended) - start_s,
            bytes_read=each.bytes_read,
            bytes_written=each.bytes_written,
            source=each.place.step.source,
        )


def stream_of(operator: str) -> Stream:
    """The stream on which an operator of this name runs."""
    return Stream.COMMUNICATION if operator.startswith(_COMMUNICATION) else Stream.COMPUTE


@cache
def _moves_data(operator: str) -> bool:
    """Whether it reads and writes elements: a view, or a product of sizes, does not."""
    if operator.startswith(PYTHON) or operator == "aten._unsafe_view.default":
        return False
    return operator.startswith((ISLAND, OBJECT)) or not getattr(resolve(operator), "is_view", False)


def _num_bytes(value: object) -> int:
    """Size of the tensors, each once; an expanded one counts what it has in memory."""
    tensors = {id(x): x for x in tensors_in(value)}.values()
    return sum(
        min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
        for x in tensors
        if x.layout is torch.strided
    )
