"""Write the README's table of figures from `benchmarks/results`."""

import json
from typing import Any

from benchmarks.result import ROOT

START, END = "<!-- figures -->", "<!-- end of figures -->"


def table() -> str:
    """Lay out every row that has a target, hits and misses alike."""
    lines = ["| claim | figure | target | holds | script |", "|---|---|---|---|---|"]
    machines: set[str] = set()
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        machines.add(f"`{result['benchmark']}`: {result['hardware']}, {result['commit']}")
        lines += [_line(result["benchmark"], row) for row in result["rows"] if row["target"]]
    return "\n".join([*lines, "", "Measured on:", "", *(f"- {m}" for m in sorted(machines))])


def with_table(text: str) -> str:
    """Put the table between the marks of the README's text."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


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
