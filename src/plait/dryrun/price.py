"""`plait.price`: what a schedule would cost on a cluster, in time and memory.

It replays the very programs that `plait.run` runs, on forms (`replay_step.py`), gives each operator
a time, and plays them on the streams of a rank (`cost/simulate.py`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from plait.cost.clusters import Cluster
from plait.cost.nccl_tests import Measured, unmatched
from plait.cost.operations import Kind
from plait.cost.overlap import exposed_s
from plait.cost.simulate import Host, Simulation, simulate
from plait.cost.table import Source, Table
from plait.cost.timeline import Event, Stream, Timeline
from plait.dryrun.durations import placements_of, timed_launches
from plait.dryrun.forms import Form, Forms
from plait.dryrun.memory import Ledger, Places, ledger_of, outside_bytes
from plait.dryrun.memory_trace import Kind as MemoryKind
from plait.dryrun.memory_trace import MemoryTrace
from plait.dryrun.replay import Launched, Replay
from plait.dryrun.replay_step import StepReplay
from plait.dryrun.workspace import Workspace
from plait.errors import PlanError
from plait.graph.schedule import Schedule

_PRODUCTS, _OPTIMIZER = "matrix products", "optimizer"
_PARTS = {
    Kind.MATRIX: _PRODUCTS,
    Kind.ATTENTION: "attention",
    Kind.MEMORY: "memory-bound operators",
    Kind.FREE: "views",
}


@dataclass(frozen=True, kw_only=True)
class SourceShare:
    """How many operators got their time from a source, and how much of the time."""

    num_operators: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Price:
    """What one rank does in a training step, or in a forward and backward of a model.

    step_s with low_s and high_s: the interval in which 8 of 10 single steps should lie (where it
    comes from: docs/theory/dryrun.md). compute_s, communication_s: sums of durations. exposed_s:
    time in which something is communicated and nothing computed.
    flops: of the step, without what is computed a second time (recompute), which is recomputed. mfu
    is of the first [Chowdhery et al. 2022, arXiv:2204.02311, appendix B].
    programs_s: time from the start to the end of each program, all its runs together.
    saved_bytes: what one micro-batch keeps for its backward.
    memory: of a step when the optimizer's state exists; first_memory: of the very first one.
    num_micro_batches: of the plan; timeline and memory show the first two, the others repeat the
    second. sources: by "measured", "interpolated", "roofline". bytes_over_time: (seconds, bytes).
    parts_s: what the step is made of, by name: time of each kind of operator, all micro-batches
    together, and that in which compute waits for messages. memory_limit_bytes: of the device; None
    on a CPU, whose memory is the host's.
    """

    cluster: str
    step_s: float
    low_s: float
    high_s: float
    timeline: Timeline
    compute_s: float
    communication_s: float
    exposed_s: float
    flops: int
    recomputed_flops: int
    mfu: float
    programs_s: Mapping[str, float]
    num_micro_batches: int
    saved_bytes: int
    memory: Ledger
    first_memory: Ledger
    sources: Mapping[Source, SourceShare]
    parts_s: Mapping[str, float]
    memory_limit_bytes: int | None
    warnings: tuple[str, ...] = ()
    bytes_over_time: tuple[tuple[float, int], ...] = field(default=(), repr=False)
    trace: MemoryTrace = field(default_factory=MemoryTrace, repr=False, compare=False)

    @property
    def fits(self) -> bool | None:
        """Whether the device has the memory; None where that is not known."""
        if self.memory_limit_bytes is None:
            return None
        return self.memory.total_bytes <= self.memory_limit_bytes

    @property
    def binding(self) -> str:
        """What holds the step back: memory that is missing, or the largest loss of time.

        Matrix products are a loss only where there is no other.
        """
        if self.memory_limit_bytes is not None and not self.fits:
            return f"memory: {self.memory.missing(self.memory_limit_bytes)}"
        taking = {name: seconds for name, seconds in self.parts_s.items() if seconds > 0}
        losses = {name: seconds for name, seconds in taking.items() if name != _PRODUCTS} or taking
        if not losses:
            return "nothing: no operator takes time"
        name = max(losses, key=lambda each: losses[each])
        return f"{name}: {losses[name] / self.step_s:.0%} of the step"


def price(
    schedule: Schedule,
    cluster: Cluster,
    *,
    steps: int = 2,
    table: Table | None = None,
    measured: Sequence[Measured] = (),
    num_threads: int = 1,
    fragments: bool = True,
) -> Price:
    """Say what running a schedule would cost one rank of the cluster, without running it.

    steps: which training step is priced: 1 is the first, during which the optimizer's state is
    made; it is there in all later ones, which cost the same. table: what was measured of the
    device, by `plait calibrate`; else times are those of the roofline. measured: runs of nccl-tests
    (`plait.cost.nccl_tests`); a message of the same collective and placement takes their time.
    num_threads: of a rank on a CPU; its attention needs workspace for each. fragments: model the
    caching allocator too.

    Raises GraphError for sizes that depend on data and operators without a fake kernel; PlanError
    if the cluster has fewer ranks than the schedule's groups.
    """
    if steps < 1:
        raise PlanError(f"steps={steps}: steps are counted from 1.")
    _check_size(schedule, cluster)
    if table is not None:
        table.check_device(cluster)
    replay = Replay(schedule, Forms(schedule, Workspace(num_threads)))
    steps_replay = StepReplay(replay)
    if cluster.device.name != "cpu":
        space = Form((cluster.device.blas_workspace_bytes,), (1,), torch.uint8, "cuda")
        replay.hold(replay.make(space, MemoryKind.WORKSPACE, "cuBLAS workspace"))
    makes_state = "optimizer" in schedule.programs
    for _ in range(min(steps, 2) if makes_state else 1):
        steps_replay.step()
    return _Pricing(schedule, cluster, steps_replay, table, measured).result(fragments=fragments)


class _Pricing:
    def __init__(
        self,
        schedule: Schedule,
        cluster: Cluster,
        steps: StepReplay,
        table: Table | None,
        measured: Sequence[Measured],
    ) -> None:
        self.schedule, self.cluster, self.steps = schedule, cluster, steps
        self.replay = steps.replay
        self.first = steps.first_launches[-1]
        self.launched = self.replay.launched[self.first :]
        self.works = timed_launches(
            self.launched, schedule.groups, cluster, table, measured, steps.repeated
        )
        self.table, self.measured = table, measured
        self.is_cpu = cluster.device.name == "cpu"

    def result(self, *, fragments: bool) -> Price:
        simulation = self._simulated()
        timeline = self._timeline(simulation)
        repeated_s = self._repeated_s(simulation)
        step_s = simulation.total_s + repeated_s
        flops, again = self._flops()
        peak = self.cluster.device.peak(self._dtype())
        low_s, high_s = self._interval(step_s)
        memory = self._ledger(self.first, None, fragments)
        end = self._end_of_first()
        return Price(
            cluster=self.cluster.name,
            step_s=step_s,
            low_s=low_s,
            high_s=high_s,
            timeline=timeline,
            compute_s=timeline.busy_s(Stream.COMPUTE),
            communication_s=timeline.busy_s(Stream.COMMUNICATION),
            exposed_s=exposed_s(timeline),
            flops=flops,
            recomputed_flops=again,
            mfu=flops / (step_s * peak) if step_s else 0.0,
            programs_s=self._programs_s(simulation),
            num_micro_batches=self.schedule.num_micro_batches,
            saved_bytes=self.steps.saved_bytes,
            memory=memory,
            first_memory=memory if end is None else self._ledger(-1, end, fragments),
            sources=self._sources(),
            parts_s=self._parts_s(simulation, step_s),
            memory_limit_bytes=None if self.is_cpu else self.cluster.device.memory_bytes,
            warnings=self._warnings(),
            bytes_over_time=self._curve(simulation),
            trace=self.replay.memory,
        )

    def _simulated(self) -> Simulation:
        operations = [work.operation for work in self.works]
        host = Host.BLOCKING if self.is_cpu else Host.AHEAD
        # A CPU's messages are copies by other threads; its device's figure is not about those.
        slowdown = 1.0 if self.is_cpu else self.cluster.device.interference
        return simulate(operations, range(len(operations)), host=host, slowdown=slowdown)

    def _timeline(self, simulation: Simulation) -> Timeline:
        events = (
            Event(
                name=each.step.name,
                operator=each.step.target,
                program=each.program,
                start_s=simulation.start_s[i],
                duration_s=simulation.end_s[i] - simulation.start_s[i],
                calls=each.calls,
                stream=Stream.COMPUTE if each.outcome.collective is None else Stream.COMMUNICATION,
                bytes_read=each.outcome.bytes_read,
                bytes_written=each.outcome.bytes_written,
                source=each.step.source,
                time_from=self._time_from(i),
            )
            for i, each in enumerate(self.launched)
        )
        return Timeline(tuple(events))

    def _repeated_s(self, simulation: Simulation) -> float:
        """Time of the micro-batches after those that were replayed: each like the last of them."""
        missing = self.schedule.num_micro_batches - self.steps.num_micro_batches
        if missing <= 0 or not self.steps.micro_batches:
            return 0.0
        *_, begins, ends = (at - self.first for at in self.steps.micro_batches[-1])
        starts_s = min(simulation.start_s[begins:ends], default=0.0)
        ends_s = max(simulation.end_s[begins:ends], default=0.0)
        return missing * (ends_s - starts_s)

    def _micro_batch_weight(self, i: int) -> int:
        """How many times a launch of the replay happens in a step."""
        missing = self.schedule.num_micro_batches - self.steps.num_micro_batches
        if missing <= 0 or not self.steps.micro_batches:
            return 1
        *_, begins, ends = self.steps.micro_batches[-1]
        return 1 + missing if begins <= i + self.first < ends else 1

    def _parts_s(self, simulation: Simulation, step_s: float) -> dict[str, float]:
        """Compute is one stream: what it does not work in the step it waits for messages."""
        found = dict.fromkeys((*_PARTS.values(), _OPTIMIZER), 0.0)
        for i, each in enumerate(self.launched):
            cost = each.outcome.cost
            if cost is not None:
                part = _OPTIMIZER if each.program == "optimizer" else _PARTS[cost.kind]
                duration_s = simulation.end_s[i] - simulation.start_s[i]
                found[part] += self._micro_batch_weight(i) * duration_s
        return found | {"exposed messages": max(0.0, step_s - sum(found.values()))}

    def _flops(self) -> tuple[int, int]:
        """Arithmetic of products and attention, and what of it repeats a step of the forward."""
        forward = {
            (program.name.removesuffix("forward"), step.name, step.target)
            for program in (*self.schedule.programs.values(), *self.schedule.templates.values())
            if program.name.endswith("forward")
            for step in program.steps
        }
        flops = again = 0
        for i, each in enumerate(self.launched):
            count = each.outcome.cost.flops if each.outcome.cost is not None else 0
            if not count:
                continue
            count *= self._micro_batch_weight(i)
            inner = each.calls[-1].template if each.calls else each.program
            name, _, part = inner.rpartition("backward")
            is_again = not part and (name, each.step.name, each.step.target) in forward
            flops, again = flops + count * (not is_again), again + count * is_again
        return flops, again

    def _dtype(self) -> Any:
        """The dtype in which most of the arithmetic is done."""
        count: dict[Any, int] = {}
        for each in self.launched:
            cost = each.outcome.cost
            if cost is not None and cost.flops:
                count[cost.dtype] = count.get(cost.dtype, 0) + cost.flops
        default = next(iter(self.cluster.device.peak_flops_per_s))
        return max(count, key=lambda dtype: count[dtype], default=default)

    def _interval(self, step_s: float) -> tuple[float, float]:
        """Errors of one operator are one error; those of others, and two of a table, are apart."""
        below: dict[str, float] = {}
        above: dict[str, float] = {}
        for i, (each, work) in enumerate(zip(self.launched, self.works, strict=True)):
            weight, key = self._micro_batch_weight(i), each.step.target
            duration = work.duration
            below[key] = below.get(key, 0.0) + weight * (duration.seconds - duration.low_s)
            above[key] = above.get(key, 0.0) + weight * (duration.high_s - duration.seconds)
        if self.table is not None:
            below["the machine"] = step_s * (1 - self.table.step_low)
            above["the machine"] = step_s * (self.table.step_high - 1)
            below["the program"] = step_s * -math.expm1(-self.table.program_spread)
            above["the program"] = step_s * math.expm1(self.table.program_spread)
        shift_low = sum(x * x for x in below.values()) ** 0.5
        shift_high = sum(x * x for x in above.values()) ** 0.5
        return max(0.0, step_s - shift_low), step_s + shift_high

    def _programs_s(self, simulation: Simulation) -> dict[str, float]:
        """Time between the first start and the last end of every run of a program, summed."""
        spans: dict[tuple[str, int], tuple[float, float]] = {}
        for i, each in enumerate(self.launched):
            key = (each.program, each.run)
            start_s, end_s = spans.get(key, (simulation.start_s[i], 0.0))
            spans[key] = (
                min(start_s, simulation.start_s[i]),
                max(end_s, simulation.end_s[i]),
            )
        found: dict[str, float] = {}
        for (name, _), (start_s, end_s) in spans.items():
            found[name] = found.get(name, 0.0) + end_s - start_s
        return found

    def _ledger(self, first: int, last: int | None, fragments: bool) -> Ledger:
        everything = self.replay.launched
        places = Places(_Words(everything), _Sources(everything))
        return ledger_of(
            self.replay.memory,
            first=first,
            last=last,
            places=places,
            outside_bytes=outside_bytes(self.cluster, len(self.schedule.groups)),
            fragments=fragments,
        )

    def _end_of_first(self) -> int | None:
        starts = self.steps.first_launches
        return starts[1] - 1 if len(starts) > 1 else None

    def _time_from(self, i: int) -> str:
        """Where the time of a launch comes from; of a view that takes none, nowhere."""
        work = self.works[i]
        return work.duration.source.value if work.is_priced else ""

    def _sources(self) -> dict[Source, SourceShare]:
        counts: dict[Source, int] = dict.fromkeys(Source, 0)
        seconds: dict[Source, float] = dict.fromkeys(Source, 0.0)
        for i, work in enumerate(self.works):
            if work.is_priced:
                weight, source = self._micro_batch_weight(i), work.duration.source
                counts[source] += weight
                seconds[source] += weight * work.duration.seconds
        return {
            source: SourceShare(num_operators=counts[source], seconds=seconds[source])
            for source in Source
        }

    def _warnings(self) -> tuple[str, ...]:
        unknown = sorted(
            {
                each.step.target.removesuffix(".default")
                for each, work in zip(self.launched, self.works, strict=True)
                if each.outcome.is_unknown and work.duration.source is Source.ROOFLINE
            }
        )
        found: list[str] = []
        if unknown:
            found.append(
                f"no cost is known of {', '.join(unknown)}: priced by the bytes that go in and "
                "out. Register a formula with torch.utils.flop_counter.register_flop_formula, or "
                "measure it with plait calibrate."
            )
        if self.measured and not self._has_measured_message():
            placements = placements_of(self.cluster, self.schedule.groups).values()
            placed = [(each.num_ranks, each.ranks_in_node) for each in placements]
            found.append(unmatched(self.measured, placed, "schedule"))
        return tuple(found)

    def _has_measured_message(self) -> bool:
        return any(
            each.outcome.collective is not None and work.duration.source is Source.MEASURED
            for each, work in zip(self.launched, self.works, strict=True)
        )

    def _curve(self, simulation: Simulation) -> tuple[tuple[float, int], ...]:
        """Live bytes over time: the largest while each operator runs."""
        found: dict[int, int] = {}
        for moment, live in self.replay.memory.curve():
            if moment >= self.first:
                found[moment] = max(live, found.get(moment, 0))
        return tuple(
            (simulation.start_s[moment - self.first], live) for moment, live in found.items()
        )


class _Words(Sequence[str]):
    """Of each launch, in words where it stands; made when it is asked for."""

    def __init__(self, launched: Sequence[Launched]) -> None:
        self.launched = launched

    def __len__(self) -> int:
        return len(self.launched)

    def __getitem__(self, i: Any) -> Any:
        each = self.launched[i]
        calls = ", in ".join(str(call) for call in reversed(each.calls))
        where = (
            f"{calls}, in the program {each.program}" if calls else f"the program {each.program}"
        )
        return f"{each.step.name} = {each.step.target} in {where}"


class _Sources(_Words):
    def __getitem__(self, i: Any) -> Any:
        return self.launched[i].step.source


def _check_size(schedule: Schedule, cluster: Cluster) -> None:
    needed = 1
    for size in schedule.groups.values():
        needed *= size
    if needed > cluster.num_ranks:
        axes = ", ".join(f"{name}={size}" for name, size in schedule.groups.items())
        raise PlanError(
            f"the schedule communicates over {needed} ranks ({axes}), and the cluster "
            f"{cluster.name} has {cluster.num_ranks}. Price it on {cluster.name}({needed}) or more."
        )
