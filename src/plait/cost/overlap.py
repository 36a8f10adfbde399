"""The report of what communication was hidden: times of five runs, and what follows from them.

    hidden     = (Ts - To) / (Ts - Tn)
    net hidden = (T0 - To) / (T0 - Tn0)

T0: unsplit, each message waited for at once. Ts: split, waited for at once. To: split and ordered.
Tn0 and Tn: the first and the second with free communication. Net hidden is the headline: it charges
what splitting costs. All are shares of communication time and mean little without its ratio to
compute, which stands beside them. Exposed time is read off a timeline; it does not see what
overlapping slows down, so it is shown, but is no measure of success.
"""

import json
from dataclasses import dataclass, field
from typing import cast

from plait.cost.timeline import Stream, Timeline
from plait.errors import GraphError

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class OverlapTimes:
    """One direction: seconds of the five runs, and the timelines of the first and the third.

    num_replicas: of this direction; the other may do with another number. unsplit_s is T0, split_s
    Ts, overlapped_s To, free_s Tn0, split_free_s Tn.
    """

    num_replicas: int
    unsplit_s: float
    split_s: float
    overlapped_s: float
    free_s: float
    split_free_s: float
    unsplit: Timeline | None = field(default=None, compare=False)
    overlapped: Timeline | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Check that there is communication to hide."""
        if self.free_s <= 0 or self.unsplit_s <= self.free_s or self.split_s <= self.split_free_s:
            raise GraphError(
                f"unsplit {self.unsplit_s} s and split {self.split_s} s must take longer than with "
                f"free communication, {self.free_s} s and {self.split_free_s} s: nothing is hidden "
                "where nothing is sent, or where noise is larger than what is sent."
            )

    @property
    def communication_s(self) -> float:
        """What communication adds to the unsplit program, T0 - Tn0."""
        return self.unsplit_s - self.free_s

    @property
    def communication_to_compute(self) -> float:
        """Its ratio to the time without it."""
        return self.communication_s / self.free_s

    @property
    def net_hidden(self) -> float:
        """Share of it that is won, net of the split: (T0 - To) / (T0 - Tn0)."""
        return (self.unsplit_s - self.overlapped_s) / self.communication_s

    @property
    def hidden(self) -> float:
        """Share of the split program's communication that is won: (Ts - To) / (Ts - Tn)."""
        return (self.split_s - self.overlapped_s) / (self.split_s - self.split_free_s)

    @property
    def split_penalty(self) -> float:
        """What splitting adds to compute, as a share of communication: (Tn - Tn0) / (T0 - Tn0)."""
        return (self.split_free_s - self.free_s) / self.communication_s

    @property
    def speedup(self) -> float:
        """T0 / To."""
        return self.unsplit_s / self.overlapped_s

    @property
    def trace_exposed(self) -> float | None:
        """Share of the communicating time of To in which nothing is computed, off its timeline."""
        if self.overlapped is None:
            return None
        busy_s = _length(_busy(self.overlapped, Stream.COMMUNICATION))
        return exposed_s(self.overlapped) / busy_s if busy_s else 0.0

    def figures(self) -> dict[str, float | None]:
        """All of the above, by name."""
        return {
            "replicas": self.num_replicas,
            "net hidden": self.net_hidden,
            "hidden": self.hidden,
            "communication / compute": self.communication_to_compute,
            "split penalty": self.split_penalty,
            "speed-up": self.speedup,
            "trace-exposed": self.trace_exposed,
        }


@dataclass(frozen=True, kw_only=True)
class OverlapReport:
    """What `plait overlap` found. axis: along what, "tokens" or "batch".

    times: by direction, "forward" and "backward". notes: hardware, links, and what was refused.
    predicted: what the cost model says of the same runs. rounds: net hidden of each round.
    """

    model: str
    axis: str
    times: dict[str, OverlapTimes]
    notes: tuple[str, ...] = ()
    predicted: dict[str, OverlapTimes] = field(default_factory=dict[str, OverlapTimes])
    rounds: dict[str, tuple[float, ...]] = field(default_factory=dict[str, tuple[float, ...]])

    @property
    def title(self) -> str:
        """What was split, and along what."""
        return f"{self.model}, split along the {self.axis}"

    def __str__(self) -> str:
        """A table: the share first, then what it is made of."""
        columns = list(self.times)
        lines = [self.title, " " * 25 + "".join(f"{name:>12}" for name in columns)]
        figures = [self.times[name].figures() for name in columns]
        for figure in figures[0] if figures else ():
            values = "".join(f"{_printed(figure, each[figure]):>12}" for each in figures)
            lines.append(f"{figure:<25}{values}")
        if all(name in self.rounds for name in columns):
            spans = [(min(self.rounds[name]), max(self.rounds[name])) for name in columns]
            cells = "".join(f"{f'{low:.0%}..{high:.0%}':>12}" for low, high in spans)
            lines.append(f"{'net hidden, rounds':<25}{cells}")
        if all(name in self.predicted for name in columns):
            cells = "".join(f"{self.predicted[name].net_hidden:>12.1%}" for name in columns)
            lines.append(f"{'net hidden, predicted':<25}{cells}")
        lines.append("")
        for label, name in _RUNS.items():
            values = "".join(
                f"{cast('float', getattr(self.times[each], name)) * 1e3:>12.3f}" for each in columns
            )
            lines.append(f"{label + ', ms':<25}{values}")
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> str:
        """Figures and times, without the timelines."""
        directions = {
            name: _figures_and_times(each) | {"net hidden, rounds": self.rounds.get(name, ())}
            for name, each in self.times.items()
        }
        predicted = {name: _figures_and_times(each) for name, each in self.predicted.items()}
        rest = {name: getattr(self, name) for name in ("model", "axis", "notes")}
        return json.dumps(rest | {"directions": directions, "predicted": predicted})

    def to_chrome_trace(self) -> dict[str, object]:
        """For Perfetto: a process for each run, unsplit above overlapped, two streams in each."""
        events: list[dict[str, object]] = []
        for number, (title, timeline) in enumerate(self.timelines()):
            events.append(
                {"name": "process_name", "ph": "M", "pid": number, "args": {"name": title}}
            )
            trace = cast("list[dict[str, object]]", timeline.to_chrome_trace()["traceEvents"])
            events.extend({**event, "pid": number} for event in trace)
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def timelines(self) -> list[tuple[str, Timeline]]:
        """Those there are, with titles, unsplit before overlapped."""
        found: list[tuple[str, Timeline]] = []
        for direction, times in self.times.items():
            if times.unsplit is not None:
                found.append((f"{direction}, unsplit", times.unsplit))
            if times.overlapped is not None:
                count = times.num_replicas
                name = f"{direction}, {count} replica{'s' if count > 1 else ''}"
                found.append((name, times.overlapped))
        return found


def exposed_s(timeline: Timeline) -> float:
    """Time in which something is communicated and nothing computed."""
    return _length(exposed_intervals(timeline))


def exposed_intervals(timeline: Timeline) -> list[Interval]:
    """When that is, in order."""
    computing = _busy(timeline, Stream.COMPUTE)
    exposed: list[Interval] = []
    for start, end in _busy(timeline, Stream.COMMUNICATION):
        for busy_from, busy_to in computing:
            if busy_to <= start:
                continue
            if busy_from >= end:
                break
            if busy_from > start:
                exposed.append((start, busy_from))
            start = busy_to
        if start < end:
            exposed.append((start, end))
    return exposed


def _busy(timeline: Timeline, stream: Stream) -> list[Interval]:
    """Disjoint intervals in which a stream works, in order."""
    merged: list[Interval] = []
    spans = sorted((x.start_s, x.end_s) for x in timeline.events if x.stream is stream)
    for start, end in spans:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def _length(intervals: list[Interval]) -> float:
    return sum(end - start for start, end in intervals)


_RUNS = {
    "T0   unsplit": "unsplit_s",
    "Ts   split": "split_s",
    "To   overlapped": "overlapped_s",
    "Tn0  unsplit, free": "free_s",
    "Tn   split, free": "split_free_s",
}


def _figures_and_times(times: OverlapTimes) -> dict[str, object]:
    seconds = {run: getattr(times, run) for run in _RUNS.values()}
    return {"figures": times.figures(), "seconds": seconds}


def _printed(figure: str, value: float | None) -> str:
    if value is None:
        return "-"
    if figure == "replicas":
        return str(value)
    if figure in ("communication / compute", "speed-up"):
        return f"{value:.2f}"
    return f"{value:.1%}"
