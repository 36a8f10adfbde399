"""What a compiled function tells about itself: graphs, breaks, recompilations, time by phase."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field

from plait.backend.watch import Watch, remembering_frames
from plait.executor.islands import Islands
from plait.graph.breaks import STEP, Break, explain_guard, make_break, short_path
from plait.graph.graph import Graph
from plait.graph.schedule import Schedule
from plait.graph.source import resumed

_PHASES = {
    "read": "reading the program",
    "trace": "tracing its operators",
    "generate": "generating code",
}
ONE_LINE = 'torch.compile(backend="plait")'


@dataclass(frozen=True)
class CapturedGraph:
    """One graph. num_operators: as if every block were inlined. blocks: calls by class of layer."""

    where: str
    num_operators: int
    blocks: dict[str, int]
    num_templates: int


@dataclass
class Report:
    """Result of `compiled.report()`; its text is meant to be read.

    name: the function that was compiled. breaks: each place once; `times` counts how often it was
    met. recompilations: what differed from the call before, once for each recompilation.
    """

    level: str
    name: str = ONE_LINE
    graphs: list[CapturedGraph] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)
    times: Counter[Break] = field(default_factory=Counter)
    num_guards: int = 0
    recompilations: list[str] = field(default_factory=list)
    flat_blocks: dict[str, str] = field(default_factory=dict)
    whole_graphs: dict[str, str] = field(default_factory=dict)
    eager_graphs: dict[str, str] = field(default_factory=dict)
    phases_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    from_cache: bool = False
    notes: list[str] = field(default_factory=list)
    islands: list[str] = field(default_factory=list)  # what was fused, and what could not be
    frames: set[str] = field(default_factory=set)  # compile ids of what Dynamo compiled
    read_s: float = 0.0  # spent in Dynamo, what it called included
    kept: list[tuple[str, Graph]] | None = None  # place and graph, where reports are collected

    @property
    def num_graphs(self) -> int:
        """Graphs compiled so far."""
        return len(self.graphs)

    def add(self, captured: CapturedGraph, graph: Graph) -> None:
        """Add a graph; the graph itself is kept only for who collects reports."""
        self.graphs.append(captured)
        if self.kept is not None:
            self.kept.append((captured.where, graph))

    def note_islands(self, schedule: Schedule, islands: Islands) -> None:
        """Add what a program's islands are, and what became of them."""
        self.islands += [*schedule.island_lines(), *islands.lines()]
        self.notes += [*map(str, schedule.notes), *schedule.certificate_lines()]

    def note_break(self, item: Break, *, is_vague: bool = False) -> None:
        """Add a break. What is vague is left out where another reason is known for the line."""
        same_line = [each for each in self.breaks if each.where == item.where]
        if is_vague and any(each != item for each in same_line):
            return
        self.breaks = [
            each for each in self.breaks if each.where != item.where or not _is_step(each)
        ]
        if item not in self.breaks:
            self.breaks.append(item)
        self.times[item] += 1

    def note_frames(self, frames: Sequence) -> None:
        """Add guards, recompilations, time, and what was given up, from the records of frames."""
        for frame in frames:
            self.frames.add(str(frame.compile_id))
            self.num_guards += frame.guard_count or 0
            self.read_s += frame.entire_frame_compile_time_s or 0.0
            if frame.recompile_reason:
                self.recompilations.append(explain_guard(frame.recompile_reason))
            if frame.fail_type == "Unsupported":
                self.note_break(_given_up(frame), is_vague=True)
        ours_s = sum(self.phases_s.values()) - self.phases_s["read"]
        self.phases_s["read"] = max(0.0, self.read_s - ours_s)

    def note(self, watch: Watch) -> None:
        """Add all that was seen by a watch."""
        for cause in watch.breaks():
            self.note_break(
                make_break(cause.reason, cause.user_stack), is_vague=cause.reason == STEP
            )
        self.note_frames(watch.frames())

    def to_json(self) -> dict[str, object]:
        """Everything, for programs to read."""
        breaks = [{**asdict(each), "times": self.times[each]} for each in self.breaks]
        names = ("name", "level", "num_guards", "recompilations", "flat_blocks", "whole_graphs")
        names += ("eager_graphs", "from_cache", "islands", "notes")
        return {
            **{name: getattr(self, name) for name in names},
            "graphs": [asdict(graph) for graph in self.graphs],
            "breaks": breaks,
            "phases_s": dict(self.phases_s),
        }

    def __str__(self) -> str:
        sections = [
            ("graphs", [_graph_line(graph) for graph in self.graphs if graph.num_operators]),
            ("graph breaks", [_break_lines(each, self.times[each]) for each in self.breaks]),
            ("recompilations, by what differed from the call before", _merged(self.recompilations)),
            ("repeated blocks captured one by one", _pairs(self.flat_blocks)),
            ("graphs captured as a whole, without templates", _pairs(self.whole_graphs)),
            ("graphs that fell back to eager operators", _pairs(self.eager_graphs)),
            ("islands", self.islands),
            ("compile time", [f"{_PHASES[name]}: {self.phases_s[name]:.2f} s" for name in _PHASES]),
            ("notes", self.notes),
        ]
        lines = [line for title, lines in sections for line in _section(title, lines)]
        return "\n".join([_headline(self), *lines])


_collected: ContextVar[list[Report] | None] = ContextVar("collected", default=None)


def new_report(level: str) -> Report:
    """The report of a backend; it is known to whoever collects reports."""
    report = Report(level)
    collected = _collected.get()
    if collected is not None:
        report.kept = []
        collected.append(report)
    return report


def is_collecting() -> bool:
    """Whether reports are collected here: then everything is captured, whatever is stored."""
    return _collected.get() is not None


@contextmanager
def collecting_reports() -> Iterator[list[Report]]:
    """Collect the report of everything that is compiled here for the first time.

    The list is complete at the end. A function compiled by torch.compile does not note its breaks
    itself: what no `plait.jit` noted is added to the report of torch.compile's backend.
    """
    reports: list[Report] = []
    token = _collected.set(reports)
    with remembering_frames() as watch:
        try:
            yield reports
        finally:
            _collected.reset(token)
            _note_unclaimed(reports, watch)


def _note_unclaimed(reports: Sequence[Report], watch: Watch) -> None:
    unclaimed = next((report for report in reports if report.name == ONE_LINE), None)
    if unclaimed is None:
        return
    known = {each.where for report in reports for each in report.breaks}
    claimed = {compile_id for report in reports for compile_id in report.frames}
    for cause in watch.breaks():
        item = make_break(cause.reason, cause.user_stack)
        if item.where not in known:
            unclaimed.note_break(item, is_vague=cause.reason == STEP)
    unclaimed.note_frames([x for x in watch.frames() if str(x.compile_id) not in claimed])


def _is_step(item: Break) -> bool:
    return item.reason.startswith(make_break(STEP, ()).reason)


def _given_up(frame) -> Break:
    """The break of a frame that cannot go on after it: in a try or with, in a loop."""
    place = f"{frame.fail_user_frame_filename}:{frame.fail_user_frame_lineno}"
    name = resumed(frame.co_name)
    found = make_break(frame.fail_reason or "", ())
    reason = f"{found.reason}, and `{name}` cannot go on in a graph behind it"
    advice = f"{found.advice}; until then this call of `{name}` runs as plain Python"
    return Break(place, reason, advice)


def _headline(report: Report) -> str:
    operators = sum(graph.num_operators for graph in report.graphs)
    stored = ", read from the cache" if report.from_cache else ""
    return (
        f"{report.name}: {_plural(report.num_graphs, 'graph')}{stored}, "
        f"{_plural(operators, 'operator')}, {_plural(len(report.breaks), 'graph break')}, "
        f"{_plural(report.num_guards, 'guard')}, "
        f"{_plural(len(report.recompilations), 'recompilation')} (level {report.level})"
    )


def _graph_line(graph: CapturedGraph) -> str:
    calls = ", ".join(f"{count} x {name}" for name, count in graph.blocks.items())
    blocks = f" ({calls}, from {_plural(graph.num_templates, 'trace')})" if calls else ""
    return f"{short_path(graph.where)}: {_plural(graph.num_operators, 'operator')}{blocks}"


def _break_lines(item: Break, times: int) -> str:
    count = f", {times} times" if times > 1 else ""
    return (
        f"{short_path(item.where)}{count}\n    why: {item.reason}\n    to avoid it: {item.advice}"
    )


def _pairs(reasons: dict[str, str]) -> list[str]:
    return [f"{short_path(what)}: {reason}" for what, reason in reasons.items()]


def _merged(lines: Sequence[str]) -> list[str]:
    counts = Counter(lines)
    return [f"{line}, {n} times" if n > 1 else line for line, n in counts.items()]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
