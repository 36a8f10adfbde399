"""The timeline of a run: when each operator runs, on which stream, and what it moves.

A profile measures it, a dry run predicts it; both make this type, so their difference is the error
of the prediction.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from pathlib import Path

from plait.graph.place import Call

_MICROSECONDS_PER_S = 1e6
_DIGITS = 3  # nanoseconds


class Stream(Enum):
    """A queue of the device; what stands in one runs in order."""

    COMPUTE = "compute"
    COMMUNICATION = "communication"


@dataclass(frozen=True, kw_only=True)
class Event:
    """One operator, once. start_s counts from the start of the timeline.

    name: of the step. program: the outermost one. calls: the templates' calls around it.
    bytes_read and bytes_written: sizes of its tensors; a view moves nothing. source: the user's
    line. time_from: of a predicted event, where its time comes from (`Source`), if it
    takes any.
    """

    name: str
    operator: str
    program: str
    start_s: float
    duration_s: float
    calls: tuple[Call, ...] = ()
    stream: Stream = Stream.COMPUTE
    bytes_read: int = 0
    bytes_written: int = 0
    source: str = ""
    time_from: str = ""

    @property
    def end_s(self) -> float:
        """When it ends."""
        return self.start_s + self.duration_s


@dataclass(frozen=True, kw_only=True)
class Total:
    """All events of one operator."""

    operator: str
    stream: Stream
    num_events: int
    duration_s: float
    bytes_read: int
    bytes_written: int


@dataclass(frozen=True)
class Timeline:
    """Events, in the order of the schedule."""

    events: tuple[Event, ...]

    @property
    def duration_s(self) -> float:
        """From the start of the timeline to the end of its last event."""
        return max((event.end_s for event in self.events), default=0.0)

    def busy_s(self, stream: Stream) -> float:
        """Sum of the durations on a stream."""
        return sum(event.duration_s for event in self.events if event.stream is stream)

    def totals(self) -> list[Total]:
        """Totals by operator, the longest first."""
        found: dict[tuple[str, Stream], list[Event]] = {}
        for event in self.events:
            found.setdefault((event.operator, event.stream), []).append(event)
        totals = [_total(operator, stream, each) for (operator, stream), each in found.items()]
        return sorted(totals, key=lambda total: -total.duration_s)

    def figures(self) -> dict[str, dict[str, float]]:
        """Seconds by operator, those that take any, and by stream: what `plait compare` reads."""
        return {
            "operators_s": {
                each.operator: each.duration_s for each in self.totals() if each.duration_s
            },
            "streams_s": {stream.value: self.busy_s(stream) for stream in Stream},
        }

    def to_chrome_trace(self) -> dict[str, object]:
        """Lay it out for Perfetto or chrome://tracing; calls of templates span their operators.

        The format: "Trace Event Format" of the Chromium project, complete events ("ph": "X").
        """
        rows = [_named_row(stream) for stream in Stream]
        spans = [span for event in _calls(self.events) for span in [_complete(event, "call")]]
        leaves = [_complete(event, "operator") for event in self.events]
        return {"traceEvents": [*rows, *spans, *leaves], "displayTimeUnit": "ms"}

    def save(self, path: str | Path) -> None:
        """Write the Chrome trace as JSON."""
        Path(path).write_text(json.dumps(self.to_chrome_trace()), encoding="utf-8")

    def __str__(self) -> str:
        """Lay the totals out as a table."""
        whole_s = sum(event.duration_s for event in self.events) or 1.0
        lines = [f"{len(self.events)} operators in {self.duration_s * 1e3:.3f} ms"]
        lines += [f"{'ms':>10} {'share':>6} {'count':>6} {'MB':>9}  operator"]
        for each in self.totals():
            moved = (each.bytes_read + each.bytes_written) / 1e6
            lines.append(
                f"{each.duration_s * 1e3:10.3f} {each.duration_s / whole_s:6.1%} "
                f"{each.num_events:6} {moved:9.2f}  {each.operator}"
            )
        return "\n".join(lines)


def _total(operator: str, stream: Stream, events: list[Event]) -> Total:
    return Total(
        operator=operator,
        stream=stream,
        num_events=len(events),
        duration_s=sum(event.duration_s for event in events),
        bytes_read=sum(event.bytes_read for event in events),
        bytes_written=sum(event.bytes_written for event in events),
    )


def _calls(events: Iterable[Event], depth: int = 0) -> Iterator[Event]:
    """One event for each call, from the start of its first operator to the end of its last."""
    computing = [event for event in events if event.stream is Stream.COMPUTE]
    for (program, calls), group in groupby(
        computing, key=lambda event: (event.program, event.calls[: depth + 1])
    ):
        if len(calls) <= depth:
            continue
        inner = list(group)
        start_s = min(event.start_s for event in inner)
        yield Event(
            name=calls[-1].step,
            operator=str(calls[-1]),
            program=program,
            calls=calls[:-1],
            start_s=start_s,
            duration_s=max(event.end_s for event in inner) - start_s,
        )
        yield from _calls(inner, depth + 1)


def _complete(event: Event, category: str) -> dict[str, object]:
    start = round(event.start_s * _MICROSECONDS_PER_S, _DIGITS)
    end = round(event.end_s * _MICROSECONDS_PER_S, _DIGITS)
    predicted = {"time from": event.time_from} if event.time_from else {}
    return {
        "name": event.operator,
        "cat": category,
        "ph": "X",
        "ts": start,
        "dur": round(end - start, _DIGITS),
        "pid": 0,
        "tid": list(Stream).index(event.stream),
        "args": {
            "step": "/".join((event.program, *(call.step for call in event.calls), event.name)),
            "bytes read": event.bytes_read,
            "bytes written": event.bytes_written,
            "source": event.source,
            **predicted,
        },
    }


def _named_row(stream: Stream) -> dict[str, object]:
    row = list(Stream).index(stream)
    return {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": stream.value}}
