"""A graph to read: as text, as the difference that a pass made, as a page to explore."""

import difflib
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plait.graph.graph import Graph
from plait.graph.listing import Section, called, root_section, summary, template_sections


def to_text(graph: Graph) -> str:
    """Lay a graph out, a line a node: the root with its calls, then each template once."""
    parts = [f"graph: {summary(graph)}", str(root_section(graph))]
    for template in graph.templates.values():
        parts.append(f"\ntemplate {template.name} ({template.block}), {called(graph, template)}")
        sections = template_sections(template, graph)
        sections.pop("joint", None)
        parts += [str(section) for section in sections.values()]
    parts += [str(note) for note in graph.notes]
    return "\n".join(parts) + "\n"


def diff(before: Graph, after: Graph) -> str:
    """What a pass changed, by template and root, in unified style; "" if nothing."""
    old, new = _by_title(before), _by_title(after)
    parts: list[str] = []
    for title in dict.fromkeys([*old, *new]):
        was, now = _lines(old.get(title)), _lines(new.get(title))
        if was != now:
            changes = difflib.unified_diff(was, now, "before", "after", lineterm="", n=2)
            parts += [f"{title}: {_counts(was, now)}", *changes, ""]
    return "\n".join(parts)


def to_html(graph: Graph) -> str:
    """One page to explore a graph in a browser, without a network: calls, templates, values."""
    environment = ImmutableSandboxedEnvironment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(files("plait.graph").joinpath("page.html").read_text("utf-8"))
    templates = [
        {
            "name": template.name,
            "block": template.block,
            "called": called(graph, template),
            "sections": [
                (part, section)
                for part, section in template_sections(template, graph).items()
                if part != "joint"
            ],
        }
        for template in graph.templates.values()
    ]
    return page.render(summary=summary(graph), root=root_section(graph), templates=templates)


def _by_title(graph: Graph) -> dict[str, Section]:
    sections = [root_section(graph)]
    for template in graph.templates.values():
        sections += template_sections(template, graph).values()
    return {section.title: section for section in sections}


def _lines(section: Section | None) -> list[str]:
    return [] if section is None else str(section).splitlines()[1:]


def _counts(was: Sequence[str], now: Sequence[str]) -> str:
    """How many lines are new, gone or changed; a line is known by what stands before its "="."""
    old, new = ({line.partition(" = ")[0]: line for line in lines} for lines in (was, now))
    counts = {
        "added": len(new.keys() - old.keys()),
        "removed": len(old.keys() - new.keys()),
        "changed": sum(old[name] != new[name] for name in old.keys() & new.keys()),
    }
    found = [f"{count} {kind}" for kind, count in counts.items() if count]
    return ", ".join(found) or "only the order changed"
