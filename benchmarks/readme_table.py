"""Write the README's tables: figures from `benchmarks/results`, models from the registry."""

import json
from typing import Any

from benchmarks.result import ROOT
from plait.models.registry import FAMILIES

MODELS_START, MODELS_END = "<!-- models -->", "<!-- end of models -->"
START, END = "<!-- figures -->", "<!-- end of figures -->"


def table() -> str:
    """Lay out every row that has a target, hits and misses alike."""
    lines = ["| claim | figure | target | holds | script |", "|---|---|---|---|---|"]
    machines: set[str] = set()
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        machines.add(f"`{result['benchmark']}`: {result['hardware']}, {result['commit']}")
        rows = [row for row in result["rows"] if row["target"] is not None]
        lines += [_line(result["benchmark"], row) for row in rows]
    return "\n".join([*lines, "", "Measured on:", "", *(f"- {m}" for m in sorted(machines))])


def model_table() -> str:
    """Lay out the families that the registry knows."""
    lines = ["| family | architecture in `config.json` | what sets it apart |", "|---|---|---|"]
    for family in FAMILIES.values():
        lines.append(f"| {family.title} | `{family.architecture}` | {family.features} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """Put both tables between their marks in the README's text."""
    text = _between(text, START, END, table())
    return _between(text, MODELS_START, MODELS_END, model_table())


def _between(text: str, start: str, end: str, content: str) -> str:
    before, rest = text.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n{content}\n{end}{after}"


def _line(benchmark: str, row: dict[str, Any]) -> str:
    spread = ""
    if len(row["samples"]) > 1:
        spread = f" [{min(row['samples']):.3g}, {max(row['samples']):.3g}]"
    sign = ">=" if row["better"] == "higher" else "<="
    verdict = "yes" if row["holds"] else "**no**"
    return (
        f"| {row['claim']} | {row['value']:.3g} {row['unit']}{spread} "
        f"| {sign} {row['target']:g} | {verdict} | `{benchmark}` |"
    )


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text()))
