"""`plait invert`: from a magnetotelluric survey to a section, a report and pictures."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from plait.cli.output import duration, say, show, show_json, show_table
from plait.config import override
from plait.magnetotellurics.invert_job import InvertJob
from plait.magnetotellurics.invert_run import run_inversion
from plait.magnetotellurics.report_page import write_report


def invert_command(
    survey: Annotated[
        Path,
        typer.Argument(help="MT2DData, Occam2D or ModEM data file, or a folder of stations."),
    ],
    prior: Annotated[
        Path | None, typer.Option(help="TOML file of what is known; it is learnt first.")
    ] = None,
    other_prior: Annotated[
        Path | None, typer.Option(help="A deliberately different one, for comparison.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change one field of the job."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder; a cut run in it is continued.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Invert a magnetotelluric survey for a 2-D section, and say what came from the prior.

    Example: plait invert coprod2data.dat --prior sediments.toml --set target_rms=1.3
    """
    job = override(
        InvertJob(
            survey=str(survey),
            prior=None if prior is None else str(prior),
            other_prior=None if other_prior is None else str(other_prior),
        ),
        settings or [],
    )
    folder = out or Path("runs") / f"invert_{survey.stem}"
    try:
        run = run_inversion(job, folder, on_progress=say)
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from {shlex.quote(str(folder))}")
        raise
    page = write_report(run, folder)
    sections = [*run.learnt, run.smooth, *([run.other] if run.other else [])]
    if as_json:
        show_json(
            {
                "report": str(page),
                "sections": [
                    {"title": s.title, "rms": s.result.rms, "steps": s.result.num_steps}
                    for s in sections
                ],
            }
        )
        return
    show_table(
        [
            (
                section.title,
                f"rms {section.result.rms:.3f} in {section.result.num_steps} steps, "
                f"{duration(section.result.history[-1].duration_s)}; "
                f"{section.result.stopped_because}",
            )
            for section in sections
        ]
    )
    show(f"{page}")
