"""`plait forward`: the magnetotelluric responses of a section."""

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.output import show_table
from plait.config import override
from plait.magnetotellurics.forward_job import ForwardJob, run_forward
from plait.magnetotellurics.forward_page import write_forward_report


def forward_command(
    model: Annotated[Path, typer.Argument(help="ModEM 2-D model file (.rho).")],
    survey: Annotated[
        Path | None,
        typer.Option(help="Take stations, frequencies and data from this survey."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change one field of the job."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Compute TE, TM and tipper responses of a section; write a table and a report.

    Example: plait forward section.rho --set num_stations=30 --set min_frequency_hz=0.01
    """
    job = override(
        ForwardJob(model=str(model), survey=None if survey is None else str(survey)),
        settings or [],
    )
    run = run_forward(job)
    folder = out or Path("runs") / f"forward_{model.stem}"
    page = write_forward_report(run, folder, model=model.name)
    show_table(
        [
            ("stations", str(len(run.observations.position_m))),
            ("frequencies", str(len(run.observations.frequency_hz))),
            ("responses", str(folder / "response.csv")),
            ("report", str(page)),
        ]
    )
