"""What `plait forward` leaves behind: report.html with its pictures, and the responses."""

import html
from pathlib import Path

from plait.magnetotellurics.forward_job import ForwardRun, response_table
from plait.magnetotellurics.html_page import picture, write_page
from plait.magnetotellurics.plots import response_figure, section_figure
from plait.magnetotellurics.run_files import write_whole


def write_forward_report(run: ForwardRun, folder: Path, *, model: str) -> Path:
    """Write pictures, report.html and response.csv; give the page.

    Args:
        run: section and responses.
        folder: made if it is not there.
        model: name of the model, for the title.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "response.csv", response_table(run.observations))
    mesh, stations = run.problem.mesh, run.observations.position_m
    reach = max(float(stations.max() - stations.min()) / 2, 10 * float(mesh.width_m.min()))
    section = section_figure(
        mesh,
        run.log10_rho,
        station_m=stations,
        max_depth_m=min(reach, float(mesh.z_m[-1])),
    )
    num_rows, num_columns = mesh.ground_shape
    frequency = run.observations.frequency_hz
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in run.observations.notes)
    page = folder / "report.html"
    write_page(
        page,
        title=f"Magnetotelluric responses of {model}",
        parts=[
            f"<p>{len(stations)} stations, {len(frequency)} frequencies from "
            f"{frequency.max():g} to {frequency.min():g} Hz; {num_columns} x {num_rows} cells.</p>",
            picture(section, folder / "section.png", "The section and the stations."),
            picture(
                response_figure(run.observations),
                folder / "response.png",
                "Responses: period against distance.",
            ),
            f"<h2>Data notes</h2><ul>{notes}</ul>" if notes else "",
            "<p>Numbers: <a href='response.csv'>response.csv</a>.</p>",
        ],
    )
    return page
