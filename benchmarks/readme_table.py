"""Write what documents show of `benchmarks/results` and of the registry of models.

The README has a line for each benchmark and names every miss; docs/figures.md has every row.
"""

import json
from collections.abc import Iterator
from typing import Any

from benchmarks.result import ROOT
from plait.models.registry import FAMILIES

README, FIGURES = ROOT / "README.md", ROOT / "docs" / "figures.md"
MODELS_START, MODELS_END = "<!-- models -->", "<!-- end of models -->"
START, END = "<!-- figures -->", "<!-- end of figures -->"


def results() -> Iterator[dict[str, Any]]:
    """Read the committed results; only rows that have a target."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        yield result | {"rows": [row for row in result["rows"] if row["target"] is not None]}


def summary() -> str:
    """Count what each benchmark claims and holds, and spell out the misses."""
    lines = ["| benchmark | targets held | missed: figure (target) |", "|---|---|---|"]
    for result in results():
        name, rows = result["benchmark"], result["rows"]
        missed = [row for row in rows if not row["holds"]]
        told = "<br>".join(f"{row['claim']}: {_figure(row)} ({_target(row)})" for row in missed)
        lines.append(f"| `{name}` | {len(rows) - len(missed)} of {len(rows)} | {told} |")
    return "\n".join(lines)


def figures_page() -> str:
    """Lay out every row that has a target, hits and misses alike."""
    lines = ["# Figures", ""]
    lines += ["Each table is printed by `python -m benchmarks.NAME` and kept in"]
    lines += ["`benchmarks/results/NAME.json`. A figure is the median of its samples; their least"]
    lines += ["and largest stand in brackets. Written by `python -m benchmarks.readme_table`."]
    for result in results():
        lines += ["", f"## {result['benchmark']}", ""]
        lines += [f"{result['hardware']}; {_versions(result['versions'])}; {result['commit']}.", ""]
        if "note" in result:
            lines += [f"Note: {result['note']}.", ""]
        lines += ["| claim | figure | target | holds |", "|---|---|---|---|"]
        lines += [_line(row) for row in result["rows"]]
    return "\n".join([*lines, ""])


def model_table() -> str:
    """Lay out the families that the registry knows."""
    lines = ["| family | architecture in `config.json` | what sets it apart |", "|---|---|---|"]
    for family in FAMILIES.values():
        lines.append(f"| {family.title} | `{family.architecture}` | {family.features} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """Put both tables between their marks in the README's text."""
    text = _between(text, START, END, summary())
    return _between(text, MODELS_START, MODELS_END, model_table())


def _between(text: str, start: str, end: str, content: str) -> str:
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{content}\n{end}{after}"


def _line(row: dict[str, Any]) -> str:
    spread = ""
    if len(row["samples"]) > 1:
        spread = f" [{min(row['samples']):.3g}, {max(row['samples']):.3g}]"
    verdict = "yes" if row["holds"] else "**no**"
    return f"| {row['claim']} | {_figure(row)}{spread} | {_target(row)} | {verdict} |"


def _figure(row: dict[str, Any]) -> str:
    return f"{row['value']:.4g} {row['unit']}".strip()


def _target(row: dict[str, Any]) -> str:
    return f"{'>=' if row['better'] == 'higher' else '<='} {row['target']:g}"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
    FIGURES.write_text(figures_page())
