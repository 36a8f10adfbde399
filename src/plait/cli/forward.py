"""`plait forward`: the magnetotelluric responses of a section."""

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.output import show_table
from plait.config import override
from plait.magnetotellurics.forward_job import ForwardJob, response_table, run_forward
from plait.magnetotellurics.plots import response_figure, section_figure


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
    """Compute TE, TM and tipper responses of a section; write a table and pictures.

    Example: plait forward section.rho --set num_stations=30 --set min_frequency_hz=0.01
    """
    job = override(
        ForwardJob(model=str(model), survey=None if survey is None else str(survey)),
        settings or [],
    )
    run = run_forward(job)
    folder = out or Path("runs") / f"forward_{model.stem}"
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "response.csv"
    table.write_text(response_table(run.observations), encoding="utf-8")
    stations = run.observations.position_m
    section = folder / "section.png"
    reach = max(float(stations.max() - stations.min()) / 2, 10 * run.problem.mesh.width_m.min())
    section_figure(
        run.problem.mesh,
        run.log10_rho,
        station_m=stations,
        max_depth_m=min(reach, float(run.problem.mesh.z_m[-1])),
    ).savefig(section, dpi=110)
    pictures = folder / "response.png"
    response_figure(run.observations).savefig(pictures, dpi=110)
    show_table(
        [
            ("stations", str(len(stations))),
            ("frequencies", str(len(run.observations.frequency_hz))),
            ("responses", str(table)),
            ("section", str(section)),
            ("pseudo-sections", str(pictures)),
        ]
    )
