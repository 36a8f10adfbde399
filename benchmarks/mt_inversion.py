"""Conventional magnetotelluric inversions and anchors of the forward code, with their targets.

    python -m benchmarks.mt_inversion --json          all rows, two minutes
    python -m benchmarks.mt_inversion --json --quick  without Paralana and COPROD2, under a minute

The survey files are looked for in $PLAIT_MT_DATA, else in ../shared/data/mt. The runs are
deterministic, so that every row has one sample.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.result import Row, run_benchmark
from plait.magnetotellurics.earth import Mesh
from plait.magnetotellurics.elements import Stencil
from plait.magnetotellurics.file_meshes import mesh_of_modem, mesh_of_occam2d
from plait.magnetotellurics.forward_2d import Problem, make_problem
from plait.magnetotellurics.inversion import Checkpoint, StoppingRule
from plait.magnetotellurics.jacobian import Linearization
from plait.magnetotellurics.mesh_design import MeshDesign, mesh_from_skin_depths
from plait.magnetotellurics.model_map import brick_map
from plait.magnetotellurics.modem_data import read_modem_data
from plait.magnetotellurics.modem_model import read_modem_model
from plait.magnetotellurics.mt2d_data import read_mt2d_data
from plait.magnetotellurics.observations import Component, Observations, as_log_data
from plait.magnetotellurics.occam2d_data import read_occam2d_data
from plait.magnetotellurics.occam2d_model import read_occam2d_mesh, read_occam2d_model
from plait.magnetotellurics.plots import section_figure
from plait.magnetotellurics.receivers import OnNode
from plait.magnetotellurics.smooth_inversion import (
    SmoothInversion,
    SmoothSection,
    invert_smoothly,
)
from plait.magnetotellurics.survey import MU_0

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Targets of one inversion beside its RMS."""

    steps: float | None = None
    seconds: float | None = None


def row(claim: str, value: float, unit: str, target: float | None) -> Row:
    """Make a row whose target is an upper limit, or none."""
    return Row(claim=claim, unit=unit, target=target, better="lower", samples=[float(value)])


def progress(checkpoint: Checkpoint) -> None:
    """Show one step on stderr."""
    record = checkpoint.history[-1]
    print(
        f"  step {record.step:2d}  rms {record.rms:8.4f}  roughness {record.roughness:9.3f}  "
        f"{record.num_forward:3d} forward runs  {record.duration_s:6.1f} s",
        file=sys.stderr,
        flush=True,
    )


def block2_problem(folder: Path, name: str) -> tuple[Problem, Observations]:
    """ModEM's mesh with ModEM's plain rows and its rule for receivers on nodes."""
    observations = read_modem_data(folder / name)
    mesh = mesh_of_modem(read_modem_model(folder / "m0.rho"))
    problem = make_problem(
        mesh,
        position_m=observations.position_m,
        frequency_hz=observations.frequency_hz,
        stencil=Stencil.PLAIN,
        on_node=OnNode.RIGHT,
    )
    return problem, observations


def block2_forward(data: Path) -> list[Row]:
    """Responses, J dm and J^T d against ModEM's files."""
    folder = data / "modem2d_block2"
    problem, observations = block2_problem(folder, "d0_JT.dat")
    section = read_modem_model(folder / "m0.rho").resistivity_ohm_m()
    linearization = Linearization(problem, section, observations)
    logs = [
        as_log_data(replace(observations, value=values))
        for values in (observations.value, linearization.values)
    ]
    rows = []
    for name, component, gate in (
        ("TE", Component.TE_LOG10_RHO, 0.5),
        ("TM", Component.TM_LOG10_RHO, 0.1),
    ):
        chosen = logs[0].component == component
        ratio = 10 ** (logs[1].value - logs[0].value)[chosen]
        error = 100 * np.median(np.abs(ratio - 1))
        claim = f"BLOCK2 {name} apparent resistivity against ModEM on its mesh, median"
        rows.append(row(claim, error, "%", gate))
    change = read_modem_model(folder / "dm.rho").value / np.log(10)
    theirs = read_modem_data(folder / "Jxdm_JT.dat").value
    contacts = np.isin(observations.position_m, (317500.0, 347500.0, 377500.0))
    keep = ~contacts[observations.receiver_index]
    ours = linearization.times(change)
    error = 100 * np.linalg.norm((ours - theirs)[keep]) / np.linalg.norm(theirs[keep])
    rows.append(row("BLOCK2 J dm against ModEM, 37 of 40 sites", error, "%", 2))
    error = 100 * np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    rows.append(row("BLOCK2 J dm against ModEM, contacts too", error, "%", 2))
    d = read_modem_data(folder / "d_JT.dat").value
    theirs = read_modem_model(folder / "JTxd_JT.rho").value
    ours = linearization.transpose_times(d) / np.log(10) / MU_0**2
    error = 100 * np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    rows.append(row("BLOCK2 J^T d against ModEM", error, "%", 2))
    return rows


def inversion_rows(
    name: str, found: SmoothSection, *, target_rms: float, limits: Limits
) -> list[Row]:
    """RMS, steps and time of one inversion."""
    result = found.result
    return [
        row(f"{name}: RMS", result.rms, "", target_rms),
        row(f"{name}: steps", result.num_steps, "", limits.steps),
        row(f"{name}: time", result.history[-1].duration_s, "s", limits.seconds),
    ]


def block2_inversion(data: Path) -> list[Row]:
    """ModEM's noisy data from its 100 ohm m prior; its own NLCG needs 50 iterations to 1.04."""
    problem, observations = block2_problem(data / "modem2d_block2", "de_JT.dat")
    settings = SmoothInversion(stopping=StoppingRule(target_rms=1.05))
    found = invert_smoothly(problem, observations, settings=settings, on_step=progress)
    name = "BLOCK2 noisy, ModEM's NLCG 50 iterations"
    return inversion_rows(name, found, target_rms=1.05, limits=Limits(steps=10))


def paralana_inversion(data: Path) -> list[Row]:
    """Occam2D's own data, mesh and bricks; Occam2D needs 12 iterations to 1.0."""
    folder = data / "paralana_pb" / "occam2d"
    bricks = read_occam2d_model(folder / "Occam2DModel")
    observations = read_occam2d_data(folder / "OccamDataFile.dat")
    mesh = mesh_of_occam2d(read_occam2d_mesh(folder / "Occam2DMesh"), bricks)
    problem = make_problem(
        mesh, position_m=observations.position_m, frequency_hz=observations.frequency_hz
    )
    found = invert_smoothly(
        problem,
        observations,
        settings=SmoothInversion(),
        model_map=brick_map(bricks.brick),
        on_step=progress,
    )
    return inversion_rows(
        "Paralana, Occam2D 12 iterations", found, target_rms=1.0, limits=Limits(steps=10)
    )


def coprod2_inversion(data: Path) -> list[Row]:
    """20 stations, TE and TM, errors as given (2.5 % floor), from 30 ohm m."""
    raw = read_mt2d_data(data / "coprod2" / "coprod2data.dat")
    observations = as_log_data(raw)
    design = MeshDesign(
        cells_per_skin_depth=6, growth=1.2, station_width_m=2500.0, num_pad_skin_depths=3
    )
    mesh = mesh_from_skin_depths(
        raw.position_m,
        frequency_hz=raw.frequency_hz,
        min_resistivity_ohm_m=2.0,
        max_resistivity_ohm_m=300.0,
        design=design,
    )
    problem = make_problem(mesh, position_m=raw.position_m, frequency_hz=raw.frequency_hz)
    settings = SmoothInversion(
        start_log10_rho=1.5, stopping=StoppingRule(target_rms=1.3, max_steps=15)
    )
    found = invert_smoothly(problem, observations, settings=settings, on_step=progress)
    section_figure(
        mesh,
        found.log10_rho,
        station_m=raw.position_m,
        max_depth_m=6e4,
        title=f"COPROD2, smooth section, RMS {found.result.rms:.2f}",
    ).savefig(ROOT / "benchmarks" / "results" / "mt_coprod2.png", dpi=90)
    rows = inversion_rows("COPROD2", found, target_rms=1.3, limits=Limits(seconds=300))
    return [*rows, *coprod2_structure(mesh, found.log10_rho)]


def coprod2_structure(mesh: Mesh, log10_rho: np.ndarray) -> list[Row]:
    """Say where the sediments end and where the deep conductor lies; no targets, only figures."""
    z = mesh.z_m[mesh.num_air :]
    depth = (z[1:] + z[:-1]) / 2
    y = (mesh.y_m[1:] + mesh.y_m[:-1]) / 2
    line = (y > 0) & (y < 230800)
    # The first rows are thinner than the data see and keep the start's value.
    base = [depth[np.argmax((column > 1.0) & (depth > 300))] for column in log10_rho[:, line].T]
    deep = (depth > 8e3) & (depth < 4e4)
    conductance = (10 ** -log10_rho[deep][:, line] * np.diff(z)[deep, None]).sum(axis=0)
    where = y[line][np.argmax(conductance)] / 1e3
    name = "COPROD2: depth at which rho passes 10 ohm m, median of columns"
    return [
        row(name, float(np.median(base)), "m", None),
        row("COPROD2: y of the largest conductance between 8 and 40 km", where, "km", None),
    ]


def measure(quick: bool) -> list[Row]:
    """Run all parts, or the quick ones."""
    data = Path(os.environ.get("PLAIT_MT_DATA", ROOT / "../shared/data/mt"))
    if not data.is_dir():
        sys.exit(f"no survey data at {data}; set PLAIT_MT_DATA to their folder")
    rows = block2_forward(data) + block2_inversion(data)
    if quick:
        left_out = ("Paralana, Occam2D 12 iterations: RMS", "COPROD2: RMS")
        return rows + [
            Row(claim=claim, unit="", target=None, better="lower", full_only=True)
            for claim in left_out
        ]
    return rows + paralana_inversion(data) + coprod2_inversion(data)


if __name__ == "__main__":
    run_benchmark("mt_inversion", measure)
