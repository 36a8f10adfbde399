"""The meter of `plait overlap`: a step unsplit, split, and split and ordered, on modelled links.

One process computes what rank 0 of the tensor-parallel ranks computes; its collectives take the
time of a link (`delayed_process_group.py`). So what is hidden is wall clock, on one machine.
"""

# pyright: basic
# (Arguments of steps are not typed.)

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from plait.cost.calibrate import Sample, fit_device
from plait.cost.clusters import Cluster, Link, cpu
from plait.cost.operations import cost_of
from plait.cost.overlap import OverlapReport
from plait.cost.timeline import Stream, Timeline
from plait.errors import GraphError, PlanError
from plait.executor.delayed_process_group import (
    DelayedProcessGroup,
    communication_events,
    delayed_groups,
)
from plait.executor.observe import Lookout, Sighting
from plait.executor.outcome import outcome_of
from plait.executor.overlap_forms import (
    DIRECTIONS,
    Forms,
    best_forms,
    forms_of,
    prepared,
    unordered,
)
from plait.executor.profile import profile
from plait.executor.run import Runnable
from plait.executor.timed_rounds import (
    example_inputs,
    measure_rounds,
    net_hidden,
    timed_step,
    times_of,
    with_twin,
)
from plait.graph.graph import Graph
from plait.graph.schedule import Ref, Schedule

LATENCY_SHARE = 0.05
"""Of the mean message time of the unsplit step: what a link's latency is, where it is derived."""
_NUM_FREE_RUNS = 3
_UNSPLIT, _SPLIT, _OVERLAPPED = "unsplit", "split", "overlapped"


@dataclass(frozen=True, kw_only=True)
class Meter:
    """What is measured, and how.

    replicas: "auto" or a number; axis: "token", "batch" or None; causal_split: see `ParallelPlan`.
    link: of the tensor-parallel ranks; None: that on which their messages take `ratio` of the time
    of everything else. vocab_size: from which the inputs are drawn.
    """

    name: str
    vocab_size: int
    replicas: int | str = "auto"
    axis: str | None = None
    causal_split: bool = False
    link: Link | None = None
    ratio: float = 0.5
    num_rounds: int = 5

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.ratio > 0:
            raise PlanError(
                f"the ratio of communication to compute must be positive: {self.ratio:g}."
            )
        if self.num_rounds < 1:
            raise PlanError(f"at least one round must be measured, got {self.num_rounds}.")

    def measure(
        self, graph: Graph, on_stage: Callable[[str], None] = lambda text: None
    ) -> OverlapReport:
        """Measure a captured step of one axis; on_stage is told what is done meanwhile.

        Raises PlanError if it cannot be split as asked, GraphError if there is nothing to hide.
        """
        graph = prepared(graph)
        base = unordered(graph)
        inputs = example_inputs(base, vocab_size=self.vocab_size)
        sizes = {name: group.size for name, group in graph.groups.items()}
        (axis,) = sizes
        unknown = Link(latency_s=0.0, bandwidth_bytes_per_s=1.0)
        with delayed_groups(sizes, unknown, scale=0.0) as groups:
            group = groups[axis]
            on_stage("calibrating")
            runnable = Runnable(base)
            group.link = self.link or calibrated_link(runnable, inputs, group, self.ratio)
            cluster = calibrated_cluster(base, inputs, {axis: group.link}, sizes[axis])
            on_stage("splitting and ordering")
            how: Any = {"axis": self.axis, "causal_split": self.causal_split}
            if isinstance(self.replicas, int):
                forms = forms_of(graph, self.replicas, cluster, **how)
            else:
                forms = best_forms(graph, cluster, **how)
            return self._report(base, forms, inputs, group, on_stage)

    def _report(
        self,
        base: Schedule,
        forms: Forms,
        inputs: Sequence[Tensor],
        group: DelayedProcessGroup,
        on_stage: Callable[[str], None],
    ) -> OverlapReport:
        schedules = {_UNSPLIT: base, _SPLIT: forms.split, _OVERLAPPED: forms.overlapped}
        programs = {}
        for name, schedule in schedules.items():
            runnable = Runnable(schedule)
            programs |= with_twin(name, lambda x=runnable: timed_step(x, inputs), group)
        samples = measure_rounds(
            programs,
            self.num_rounds,
            lambda i: on_stage(f"measuring, round {i + 1} of {self.num_rounds}"),
        )
        group.scale = 1.0
        before = timelines(base, inputs, group)
        after = timelines(forms.overlapped, inputs, group)
        times = {
            direction: replace(
                times_of(samples, forms.num_replicas, list(schedules), direction),
                unsplit=before[direction],
                overlapped=after[direction],
            )
            for direction in DIRECTIONS
        }
        return OverlapReport(
            model=self.name,
            axis={"token": "tokens"}.get(forms.axis, forms.axis),
            times=times,
            notes=(*_notes(group, self.num_rounds), *forms.notes),
            predicted=forms.predicted,
            rounds={x: tuple(net_hidden(samples, _UNSPLIT, _OVERLAPPED, x)) for x in DIRECTIONS},
        )


def _notes(group: DelayedProcessGroup, num_rounds: int) -> list[str]:
    link = group.link
    return [
        f"rank 0 of {group.size()} computes here, on {torch.get_num_threads()} threads; messages "
        "are delayed, not sent (the delayed process group)",
        f"link: {link.latency_s * 1e6:.4g} us and {link.bandwidth_bytes_per_s / 1e9:.4g} GB/s",
        f"medians of {num_rounds} interleaved rounds",
    ]


def calibrated_link(
    runnable: Runnable, inputs: Sequence[Tensor], group: DelayedProcessGroup, ratio: float
) -> Link:
    """The link on which the step's messages take `ratio` of its time with free communication."""
    group.scale = 0.0
    timed_step(runnable, inputs)
    seconds: list[float] = []
    for _ in range(_NUM_FREE_RUNS):
        group.transfers.clear()
        seconds.append(sum(timed_step(runnable, inputs).values()))
    return link_for(group, statistics.median(seconds), ratio)


def calibrated_cluster(
    schedule: Schedule, inputs: Sequence[Tensor], links: Mapping[str, Link], num_ranks: int
) -> Cluster:
    """This machine as so many ranks, its figures fitted to one run of the step."""
    cluster = cpu(num_ranks)
    device = fit_device(cluster.device, operator_samples(schedule, inputs))
    return replace(cluster, device=device, links=dict(links))


def link_for(group: DelayedProcessGroup, free_s: float, ratio: float) -> Link:
    """The link on which the messages of the group's last step take `ratio` of its free time.

    Its latency is a set share of the mean time of a message. Raises GraphError if there were none.
    """
    if not group.transfers:
        raise GraphError("the step sends no message, so nothing can be hidden. Choose tp above 1.")
    communication_s = ratio * free_s
    sent = sum(each.sent_bytes for each in group.transfers)
    return Link(
        latency_s=LATENCY_SHARE * communication_s / len(group.transfers),
        bandwidth_bytes_per_s=sent / ((1 - LATENCY_SHARE) * communication_s),
    )


def timelines(
    schedule: Schedule, inputs: Sequence[Tensor], group: DelayedProcessGroup
) -> dict[str, Timeline]:
    """Observe one step: what computes when, and when the link is busy, by direction."""
    group.transfers.clear()
    seen = profile(schedule, *inputs, num_warm_ups=0)
    computed = [x for x in seen.timeline.events if x.stream is Stream.COMPUTE]
    turn_s = min(x.start_s for x in computed if x.program != "forward")
    found: dict[str, Timeline] = {}
    for direction, begins_s, ends_s in (
        ("forward", 0.0, turn_s),
        ("backward", turn_s, float("inf")),
    ):
        sent = [x for x in group.transfers if begins_s <= x.issue_s - seen.started_s < ends_s]
        events = [x for x in computed if begins_s <= x.start_s < ends_s]
        events += communication_events(sent, started_s=seen.started_s, program=direction)
        first_s = min(x.start_s for x in events)
        shifted = [replace(x, start_s=x.start_s - first_s) for x in events]
        found[direction] = Timeline(tuple(sorted(shifted, key=lambda x: x.start_s)))
    return found


def operator_samples(schedule: Schedule, inputs: Sequence[Tensor]) -> list[Sample]:
    """What each computing operator of a step does, and how long it took in one run."""
    costs: list[Any] = []

    def note(sighting: Sighting) -> None:
        step, operands = sighting.place.step, sighting.operands
        if sighting.place.is_operator:
            args = _filled(step.args, operands)
            kwargs = {key: _filled(x, operands) for key, x in step.kwargs}
            is_compute = not step.target.startswith("_c10d_functional.")
            cost = cost_of(step.target, args, kwargs, sighting.value) if is_compute else None
            costs.append(cost)

    watching = Runnable(schedule, Lookout(schedule, [note], copies=False))
    outcome_of(watching, inputs)
    events = profile(schedule, *inputs, num_warm_ups=0).timeline.events
    pairs = zip(costs, events, strict=True)
    return [(cost, event.duration_s) for cost, event in pairs if cost is not None]


def _filled(argument: Any, operands: Mapping[str, object]) -> Any:
    """The argument with operands in the place of their names."""
    if isinstance(argument, Ref):
        return operands[argument.name]
    if isinstance(argument, list | tuple):
        return type(argument)(_filled(x, operands) for x in argument)
    return argument
