"""What a compiled function tells about itself: graphs, breaks, recompilations, time by phase."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CapturedGraph:
    """One graph. num_operators: as if every block were inlined. blocks: calls by class of layer."""

    where: str
    num_operators: int
    blocks: dict[str, int]
    num_templates: int


@dataclass(frozen=True)
class Break:
    """A place where the graph ends: the line, why, and how to avoid it."""

    where: str
    reason: str
    advice: str


@dataclass
class Report:
    """Result of `compiled.report()`; its text is meant to be read."""

    level: str
    graphs: list[CapturedGraph] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)
    num_guards: int = 0
    recompilations: list[str] = field(default_factory=list)
    flat_blocks: dict[str, str] = field(default_factory=dict)
    whole_graphs: dict[str, str] = field(default_factory=dict)
    eager_graphs: dict[str, str] = field(default_factory=dict)
    phases_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    from_cache: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def num_graphs(self) -> int:
        """Graphs compiled so far."""
        return len(self.graphs)

    def __str__(self) -> str:
        """Lay the report out in lines of at most 100 characters."""
        return "\n".join(
            [
                _headline(self),
                *_section("graphs", [_graph_line(graph) for graph in self.graphs]),
                *_section("graph breaks", [_break_lines(b) for b in _counted(self.breaks)]),
                *_section("recompilations (the guard that failed)", self.recompilations),
                *_section(
                    "repeated blocks captured one by one",
                    [f"{block}: {reason}" for block, reason in self.flat_blocks.items()],
                ),
                *_section(
                    "graphs captured as a whole, without templates",
                    [f"{where}: {reason}" for where, reason in self.whole_graphs.items()],
                ),
                *_section(
                    "graphs that fell back to eager operators",
                    [f"{where}: {reason}" for where, reason in self.eager_graphs.items()],
                ),
                *_section(
                    "compile time", [f"{name}: {s:.2f} s" for name, s in self.phases_s.items()]
                ),
                *_section("notes", self.notes),
            ]
        )


def make_break(reason: str, frames: Sequence) -> Break:
    """Say in plain words why TorchDynamo ended a graph. frames: the user's stack, innermost last."""
    where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown"
    code = (frames[-1].line or "").strip() if frames else ""
    for pattern, plain, advice in _PLAIN_WORDS:
        if re.search(pattern, reason, re.IGNORECASE):
            break
    else:
        plain, advice = _first_sentence(reason), _hint(reason)
    return Break(where, f"{plain} (`{code}`)" if code else plain, advice)


_PLAIN_WORDS = [
    (
        r"Tensor\.item|aten\._local_scalar_dense|\.tolist\(\)",
        "a tensor's value is read into Python",
        "keep the value a tensor, or read it after the compiled function has returned",
    ),
    (
        r"data-dependent (branching|jump|control flow)|Data-dependent branching",
        "Python decides by the value of a tensor",
        "use torch.where or torch.cond, or decide outside of the compiled function",
    ),
    (
        r"builtin.*print|`print`|built-?in.*<built-in function print>",
        "text is printed",
        "print after the compiled function has returned",
    ),
    (
        r"torch\.compiler\.disable|torch\._dynamo\.disable|skip function",
        "the function called here is marked not to be compiled",
        "call it outside of the compiled function, if it need not stand between two graphs",
    ),
    (
        r"graph_break\(\)",
        "the program asks for a break here",
        "remove the call of torch._dynamo.graph_break()",
    ),
    (
        r"dynamic (shape|output)|nonzero|data-dependent",
        "the shape of the result depends on the values",
        "use a form with a fixed shape, such as a mask with torch.where",
    ),
    (
        r"fake (impl|tensor)|meta (impl|kernel)|no fake",
        "a custom operator does not say what its result looks like",
        "register a fake implementation with torch.library.register_fake",
    ),
    (
        r"(builtin|C/C\+\+|third-party|C function|unsupported function|cannot trace)",
        "a function is called that cannot be read as tensor operations",
        "call it outside of the compiled function, or wrap it with torch.library.custom_op",
    ),
]


def _first_sentence(reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    for line in lines:
        if line.startswith("Explanation:"):
            return line.removeprefix("Explanation:").strip().rstrip(".")
    return (lines or ["no reason was given"])[0].rstrip(".")


def _hint(reason: str) -> str:
    for line in reason.splitlines():
        if line.strip().startswith("Hint:"):
            return line.strip().removeprefix("Hint:").strip().rstrip(".")
    return "move this line out of the compiled function"


def _headline(report: Report) -> str:
    nodes = sum(graph.num_operators for graph in report.graphs)
    stored = ", read from the cache" if report.from_cache else ""
    return (
        f"level {report.level}: {_plural(report.num_graphs, 'graph')}{stored}, "
        f"{_plural(nodes, 'operator')}, {_plural(len(_counted(report.breaks)), 'graph break')}, "
        f"{_plural(report.num_guards, 'guard')}, "
        f"{_plural(len(report.recompilations), 'recompilation')}"
    )


def _graph_line(graph: CapturedGraph) -> str:
    calls = ", ".join(f"{count} x {name}" for name, count in graph.blocks.items())
    blocks = f" ({calls}, from {_plural(graph.num_templates, 'trace')})" if calls else ""
    return f"{graph.where}: {_plural(graph.num_operators, 'operator')}{blocks}"


def _break_lines(counted: tuple[Break, int]) -> str:
    item, count = counted
    times = f", {count} times" if count > 1 else ""
    return f"{item.where}{times}\n    why: {item.reason}\n    to avoid it: {item.advice}"


def _counted(breaks: Sequence[Break]) -> list[tuple[Break, int]]:
    return list(Counter(breaks).items())


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
