"""What `plait invert` leaves behind: report.html with its pictures, and the numbers as files."""

import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from plait.magnetotellurics.html_page import picture, write_page
from plait.magnetotellurics.invert_job import shown_depth_m
from plait.magnetotellurics.invert_run import Found, InvertRun
from plait.magnetotellurics.misfit import Misfit
from plait.magnetotellurics.modem_model import ModemModel, write_modem_model
from plait.magnetotellurics.observations import Component
from plait.magnetotellurics.plots import (
    amount_figure,
    convergence_figure,
    fit_figure,
    pseudo_section_figure,
    section_figure,
)
from plait.magnetotellurics.prior_file import prior_to_table
from plait.magnetotellurics.run_files import write_whole


def write_report(run: InvertRun, folder: Path) -> Path:
    """Write pictures, report.html, result.json, section.rho and response.csv; give the page."""
    limits = _limits(run)
    parts = [
        *_head(run),
        *_sections(run, folder, limits),
        *_influence(run, folder, limits),
        *_fit(run, folder),
        *_notes(run),
    ]
    page = folder / "report.html"
    title = f"Magnetotelluric inversion of {Path(run.job.survey).name}"
    write_page(page, title=title, parts=parts)
    _write_numbers(run, folder)
    return page


def _limits(run: InvertRun) -> tuple[float, float]:
    shown = run.best.log10_rho[run.in_view]
    low, high = np.percentile(shown, [1, 99])
    return float(np.floor(2 * low) / 2), float(np.ceil(2 * high) / 2)


def _all_found(run: InvertRun) -> list[Found]:
    return [*run.learnt, run.smooth, *([run.other] if run.other else [])]


def _head(run: InvertRun) -> list[str]:
    rows = "".join(
        f"<tr><td>{html.escape(found.title)}</td><td>{found.result.rms:.3f}</td>"
        f"<td>{found.result.num_steps}</td><td>{found.result.history[-1].duration_s:.0f} s</td>"
        f"<td>{html.escape(found.result.stopped_because)}</td></tr>"
        for found in _all_found(run)
    )
    num_rows, num_columns = run.problem.mesh.ground_shape
    return [
        f"<p>{run.observations.num_data} data, {len(run.observations.position_m)} stations, "
        f"{len(run.observations.frequency_hz)} frequencies; {num_columns} x {num_rows} cells.</p>",
        "<table><tr><th>section</th><th>RMS</th><th>steps</th><th>time</th><th>ended</th></tr>"
        f"{rows}</table>",
    ]


def _sections(run: InvertRun, folder: Path, limits: tuple[float, float]) -> list[str]:
    hatched = None if run.influence is None else run.influence.from_prior
    parts = ["<h2>Sections</h2>"]
    for number, found in enumerate([run.best, *[f for f in _all_found(run) if f is not run.best]]):
        name = "section.png" if number == 0 else f"section_{number}.png"
        figure = section_figure(
            run.problem.mesh,
            found.log10_rho,
            limits=limits,
            title=f"{found.title}, RMS {found.result.rms:.2f}",
            hatched=hatched if number == 0 else None,
            reference_share=run.resolution.reference_share if found is run.smooth else None,
            **_frame(run),
        )
        caption = (
            "Hatched: from the prior, not from the data (see below)."
            if number == 0 and hatched is not None
            else ""
        )
        if found is run.smooth:
            reached = bool((run.resolution.reference_share[run.in_view] > 0.5).any())
            caption = (
                "White line: depth of investigation; under it more than half of a change of the "
                "reference model would show up in the section."
                if reached
                else "Nowhere in view would half of a change of the reference model show up."
            )
        parts.append(picture(figure, folder / name, caption))
    return parts


def _frame(run: InvertRun) -> dict[str, Any]:
    return {
        "station_m": run.observations.position_m,
        "max_depth_m": shown_depth_m(run.job, run.observations),
    }


def _influence(run: InvertRun, folder: Path, limits: tuple[float, float]) -> list[str]:
    del limits
    mesh = run.problem.mesh
    parts = ["<h2>What the data resolve</h2>"]
    figure = amount_figure(
        mesh,
        run.resolution.deviation,
        most=1.0,
        label="standard deviation (decades)",
        **_frame(run),
    )
    parts.append(
        picture(
            figure,
            folder / "deviation.png",
            "Linearized posterior of the smooth section: the spread of sections as smooth as this "
            "one.",
        )
    )
    if run.learnt_deviation is not None:
        figure = amount_figure(
            mesh,
            run.learnt_deviation,
            most=1.0,
            label="standard deviation (decades)",
            **_frame(run),
        )
        parts.append(
            picture(
                figure,
                folder / "learnt_deviation.png",
                "Linearized posterior of the learnt section, before any departures from it: the "
                "spread of sections that the prior allows and the data fit.",
            )
        )
    spread = run.ensemble_deviation
    if spread is not None:
        figure = amount_figure(
            mesh, spread, most=0.5, label="deviation over seeds (decades)", **_frame(run)
        )
        parts.append(
            picture(
                figure,
                folder / "ensemble.png",
                f"Standard deviation over {len(run.learnt)} networks, each learnt from another "
                "seed.",
            )
        )
    if run.influence is None or run.other is None:
        return parts
    figure = amount_figure(
        mesh, run.influence.moved, most=1.0, label="largest difference (decades)", **_frame(run)
    )
    share = 100 * run.share_in_view(run.influence.from_prior)
    parts += [
        "<h2>What came from the prior</h2>",
        f"<p>The same data were fitted without a prior (RMS {run.smooth.result.rms:.3f}) and under "
        f"a deliberately different one, {html.escape(run.priors[1].name)!r} (RMS "
        f"{run.other.result.rms:.3f}). {_verdict_on_other(run)} {share:.0f} % of the area "
        "under the stations moved by more than the data allow (two posterior deviations, between "
        "0.1 and 0.3 decades): there the section shows the prior.</p>",
        picture(figure, folder / "influence.png", "Largest difference from the other sections."),
        "<details><summary>The prior</summary><pre>"
        f"{html.escape(json.dumps(prior_to_table(run.priors[0]), indent=1))}</pre></details>",
        "<details><summary>The different prior</summary><pre>"
        f"{html.escape(json.dumps(prior_to_table(run.priors[1]), indent=1))}</pre></details>",
    ]
    return parts


def _verdict_on_other(run: InvertRun) -> str:
    if run.other_fits:
        return "All fit alike, so that the data do not choose between them."
    return (
        "The different prior does not fit: the data rule it out, and it is left out of the "
        "comparison. Try one that lies nearer."
    )


def _fit(run: InvertRun, folder: Path) -> list[str]:
    values = run.best.result.values
    parts = ["<h2>Fit</h2>"]
    figure = convergence_figure(run.best.result.history, target_rms=run.job.target_rms)
    parts.append(picture(figure, folder / "convergence.png", f"Convergence, {run.best.title}."))
    parts.append(
        picture(
            pseudo_section_figure(run.observations, values),
            folder / "pseudo_sections.png",
            "Data, response and residual over error.",
        )
    )
    parts.append(
        picture(
            fit_figure(run.observations, values),
            folder / "fit.png",
            "Each station: data with errors, response as lines.",
        )
    )
    shifts = run.best.static_shift_log10
    if shifts.any():
        rows = "".join(
            f"<tr><td>{html.escape(name)}</td><td>{te:+.3f}</td><td>{tm:+.3f}</td></tr>"
            for name, te, tm in zip(run.observations.receiver_names, *shifts, strict=True)
        )
        parts.append(
            "<h2>Static shifts</h2><p>log10 of the gain of apparent resistivity.</p>"
            f"<table><tr><th>station</th><th>TE</th><th>TM</th></tr>{rows}</table>"
        )
    return parts


def _notes(run: InvertRun) -> list[str]:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in run.observations.notes)
    settings = (
        "<h2>Data notes</h2>"
        + (f"<ul>{items}</ul>" if items else "<p>Nothing was dropped or changed.</p>")
        + "<p>Settings: <a href='resolved.json'>resolved.json</a>; numbers: "
        "<a href='result.json'>result.json</a>, <a href='section.rho'>section.rho</a> (ModEM 2-D), "
        "<a href='response.csv'>response.csv</a>.</p>"
    )
    return [settings]


def _write_numbers(run: InvertRun, folder: Path) -> None:
    mesh = run.problem.mesh
    result = {
        "sections": [
            {
                "title": found.title,
                "rms": found.result.rms,
                "rms_of_codes": None if found.coded is None else found.coded.rms,
                "steps": found.result.num_steps,
                "stopped_because": found.result.stopped_because,
                "history": [[r.step, r.rms, r.trade_off] for r in found.result.history[1:]],
            }
            for found in _all_found(run)
        ],
        "from_prior_share": None
        if run.influence is None
        else run.share_in_view(run.influence.from_prior),
    }
    write_whole(folder / "result.json", json.dumps(result, indent=1) + "\n")
    write_modem_model(
        folder / "section.rho",
        ModemModel(
            width_m=mesh.width_m,
            thickness_m=mesh.ground_thickness_m,
            value=run.best.log10_rho,
            scale="LOG10",
        ),
    )
    write_whole(folder / "response.csv", _response_csv(run))


def _response_csv(run: InvertRun) -> str:
    observations, values = run.observations, run.best.result.values
    residual = Misfit(observations=observations).residual(values)
    lines = ["station,frequency_hz,component,value,error,response,residual_over_error"]
    kinds = [component.name for component in Component]
    for row in range(observations.num_data):
        name = observations.receiver_names[observations.receiver_index[row]].replace(",", "_")
        lines.append(
            f"{name},{observations.frequency_hz[observations.frequency_index[row]]:.8g},"
            f"{kinds[observations.component[row]]},{observations.value[row]:.8g},"
            f"{observations.error[row]:.6g},{values[row]:.8g},{residual[row]:.5g}"
        )
    return "\n".join(lines) + "\n"
