"""`plait runs`: list runs, compare them as a table and as a picture."""

import html
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from plait.checkpoint.json_file import write_text
from plait.cli.output import duration, say, show, show_json
from plait.config import to_json
from plait.errors import ConfigError, PlaitError
from plait.train.compare_runs import RunSummary, differing_settings, summarize
from plait.train.report import draw_curves
from plait.train.run_folder import RunFolder

_MISSING = "-"


def runs_command(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Run folders; default: those below runs/.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--html", help="Draw the curves here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """List runs, and compare their settings and curves.

    Example: plait runs runs/sft-1 runs/sft-2 --html compare.html
    """
    found = folders or _below(Path("runs"))
    runs: dict[str, RunFolder] = {}
    summaries: dict[str, RunSummary] = {}
    for folder in found:
        try:
            summaries[str(folder)] = summarize(RunFolder(folder))
        except PlaitError as error:
            if folders:
                raise
            say(f"{folder} is left out: {error}")
        else:
            runs[str(folder)] = RunFolder(folder)
    settings = differing_settings({name: to_json(run.read_any_job()) for name, run in runs.items()})
    if out is not None:
        write_text(out, _page(runs, summaries, settings))
    if as_json:
        show_json({"runs": {k: vars(v) for k, v in summaries.items()}, "differing": settings})
        return
    _show_columns([_HEADER, *(_cells(name, summary) for name, summary in summaries.items())])
    if folders and settings:
        show("\nsettings that differ")
        rows = [[path, *map(_text, values.values())] for path, values in settings.items()]
        _show_columns([["", *runs], *rows])


_HEADER = ["run", "recipe", "steps", "loss", "held-out", "bits/byte", "tokens/s", "time"]


def _below(folder: Path) -> list[Path]:
    found = sorted((path.parent for path in folder.glob("*/resolved.json")), key=_by_number)
    if not found:
        raise ConfigError(f"there are no runs below {folder}. Name their folders.")
    return found


def _by_number(path: Path) -> tuple[str, int]:
    """Number 10 of a recipe stands behind number 2."""
    recipe, _, number = path.name.rpartition("-")
    return (recipe, int(number)) if number.isdigit() else (path.name, 0)


def _cells(name: str, summary: RunSummary) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return _MISSING if value is None else format(value, form)

    return [
        name,
        summary.recipe,
        f"{summary.step}" + ("" if summary.finished else " (unfinished)"),
        number(summary.loss, ".4f"),
        number(summary.best_heldout_loss, ".4f"),
        number(summary.best_bits_per_byte, ".4f"),
        number(summary.tokens_per_s, ",.0f"),
        duration(summary.elapsed_s),
    ]


def _show_columns(rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        show("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _page(
    runs: dict[str, RunFolder],
    summaries: dict[str, RunSummary],
    settings: dict[str, dict[str, Any]],
) -> str:
    curves = {name: run.read_metrics() for name, run in runs.items()}
    table = [_HEADER, *(_cells(name, summary) for name, summary in summaries.items())]
    differing = [["setting", *runs], *([k, *map(_text, v.values())] for k, v in settings.items())]
    return draw_curves(curves, [_table(table), _table(differing)])


def _table(rows: list[list[str]]) -> str:
    tags = ["th", *["td"] * (len(rows) - 1)]
    lines = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(tags, rows, strict=True)
    )
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
