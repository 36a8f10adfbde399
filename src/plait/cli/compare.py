"""`plait compare`: how far a prediction is from what was measured."""

from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Annotated

import typer

from plait.cli.output import show, show_json
from plait.dryrun.compare import compare, load_figures, to_text


def compare_command(
    predicted: Annotated[Path, typer.Argument(help="JSON of plait price --json.")],
    measured: Annotated[Path, typer.Argument(help="The same fields, or some: Profile.to_json().")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Print the error of each kind of memory, operator, program and stream.

    Example: plait compare predicted.json measured.json
    """
    found = compare(load_figures(predicted), load_figures(measured))
    if as_json:
        # JSON knows no infinity: what was predicted and not measured has no error.
        show_json(
            [
                asdict(each) | {"error": each.error if isfinite(each.error) else None}
                for each in found
            ]
        )
    else:
        show(to_text(found))
