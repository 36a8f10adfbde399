"""`plait explain`: run a script, and say what the compiler made of the functions in it."""

import json
import logging
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from plait.backend.report import Report, collecting_reports
from plait.cli.output import say, show
from plait.errors import ConfigError
from plait.graph.display import to_html


def explain_command(
    script: Annotated[
        Path, typer.Argument(help="Python script that uses plait.jit or the backend.")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Arguments of the script, after a --.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the reports to this file as JSON.")
    ] = None,
    html_folder: Annotated[
        Path | None, typer.Option("--html", help="Write a page for each graph to this folder.")
    ] = None,
) -> None:
    """Run a script, then report each compiled function: graphs, breaks, recompilations, time.

    Example: plait explain examples/03_report_graph_breaks.py
    """
    if not script.is_file():
        raise ConfigError(f"{script} is not a file. Name a Python script.")
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # breaks are told by the report
    with collecting_reports() as reports:
        code = _run(script, arguments or [])
    for report in reports:
        show(f"\n{report}")
    if json_file is not None:
        text = json.dumps([report.to_json() for report in reports], indent=2)
        json_file.write_text(text + "\n", encoding="utf-8")
    if html_folder is not None:
        _write_pages(reports, html_folder)
    if code:
        raise typer.Exit(code)
    if not reports:
        raise ConfigError(
            f"{script} compiled nothing. Wrap a function or model with plait.jit(...) or "
            'torch.compile(..., backend="plait"), and call it.'
        )


def _run(script: Path, arguments: Sequence[str]) -> int:
    """Run the script as Python would; its exit code."""
    with _as_main_program(script, arguments):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as exit_:
            if exit_.code is None or isinstance(exit_.code, int):
                return exit_.code or 0
            say(str(exit_.code))
            return 1
        except Exception as error:
            say(_explained(error, script))
            return 1
    return 0


def _explained(error: Exception, script: Path) -> str:
    """The traceback from the script's first line on, without what ran the script."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != str(script):
        trace = trace.tb_next
    error = error.with_traceback(trace or error.__traceback__)
    return "".join(traceback.format_exception(error)).rstrip()


@contextmanager
def _as_main_program(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _write_pages(reports: Sequence[Report], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for report in reports:
        for where, graph in report.kept or []:
            number += 1
            path = folder / f"graph_{number}.html"
            path.write_text(to_html(graph), encoding="utf-8")
            say(f"{path}: {where}")
