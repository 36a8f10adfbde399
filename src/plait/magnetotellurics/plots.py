"""Pictures: a section with its stations, pseudo-sections of data and response, fit, convergence.

Each function returns a matplotlib Figure; figure.savefig(path) writes it. No window is opened.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.earth import Mesh
from plait.magnetotellurics.inversion import StepRecord
from plait.magnetotellurics.misfit import Misfit
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.optional_module import OptionalModule

_matplotlib: Any = OptionalModule("matplotlib.figure", needed_for="a picture")

_TITLES = {
    Component.TE_LOG10_RHO: "TE log10 rho_a (ohm m)",
    Component.TE_PHASE: "TE phase (degrees)",
    Component.TM_LOG10_RHO: "TM log10 rho_a (ohm m)",
    Component.TM_PHASE: "TM phase (degrees)",
}


def section_figure(
    mesh: Mesh,
    log10_rho: RealArray,
    *,
    station_m: RealArray,
    max_depth_m: float,
    limits: tuple[float, float] = (0.0, 4.0),
    title: str = "",
    hatched: np.ndarray | None = None,
    reference_share: RealArray | None = None,
) -> Any:
    """Draw log10 rho under the stations down to max_depth_m; stations are triangles at the top.

    Args:
        mesh: of the section.
        log10_rho: mesh.ground_shape.
        station_m: (n_rx,) positions along the profile.
        max_depth_m: lower edge of the picture.
        limits: of the colours.
        title: above the picture.
        hatched: mesh.ground_shape, cells to hatch, as those that came from a prior.
        reference_share: mesh.ground_shape; a white line is drawn where it passes one half, the
            depth of investigation.
    """
    figure = _matplotlib.Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.add_subplot()
    shown = np.where(mesh.is_ground, log10_rho, np.nan)
    image = axes.pcolormesh(
        mesh.y_m / 1e3,
        mesh.z_m[mesh.num_air :] / 1e3,
        shown,
        cmap="turbo_r",
        vmin=limits[0],
        vmax=limits[1],
        rasterized=True,
    )
    y = (mesh.y_m[1:] + mesh.y_m[:-1]) / 2e3
    z = (mesh.z_m[mesh.num_air + 1 :] + mesh.z_m[mesh.num_air : -1]) / 2e3
    if hatched is not None and hatched.any():
        levels, marks = [0.5, 1.5], ["////"]
        axes.contourf(y, z, hatched.astype(float), levels=levels, hatches=marks, colors="none")
    if reference_share is not None and (reference_share > 0.5).any():
        axes.contour(y, z, reference_share, levels=[0.5], colors="white", linewidths=2)
    top = mesh.z_m[mesh.terrain_row[np.searchsorted(mesh.y_m, station_m, side="right") - 1]]
    axes.plot(station_m / 1e3, top / 1e3, "v", color="black", markersize=6, clip_on=False)
    margin = 0.05 * (station_m.max() - station_m.min())
    axes.set_xlim((station_m.min() - margin) / 1e3, (station_m.max() + margin) / 1e3)
    axes.set_ylim(max_depth_m / 1e3, mesh.z_m[mesh.num_air] / 1e3)
    axes.set_xlabel("distance along the profile (km)")
    axes.set_ylabel("depth (km)")
    axes.set_title(title, pad=12)
    figure.colorbar(image, ax=axes, label="log10 resistivity (ohm m)")
    return figure


def amount_figure(
    mesh: Mesh,
    amount: RealArray,
    *,
    station_m: RealArray,
    max_depth_m: float,
    most: float,
    label: str,
) -> Any:
    """Draw a positive quantity of the cells, as a standard deviation, from 0 to most."""
    figure = section_figure(
        mesh,
        np.minimum(amount, most),
        station_m=station_m,
        max_depth_m=max_depth_m,
        limits=(0.0, most),
    )
    figure.axes[0].collections[0].set_cmap("magma_r")
    figure.axes[1].set_ylabel(label)
    return figure


def pseudo_section_figure(observations: Observations, values: RealArray) -> Any:
    """Draw data, response and residual over error, period against distance, one row per component.

    Raises:
        InversionError: no log10 rho or phase data to draw.
    """
    there = [c for c in _TITLES if (observations.component == c).any()]
    if not there:
        raise InversionError("pseudo-sections need log10 rho or phase data; use as_log_data")
    figure = _matplotlib.Figure(figsize=(12, 2.6 * len(there)), layout="constrained")
    grid = figure.subplots(len(there), 3, squeeze=False, sharex=True, sharey=True)
    residual = Misfit(observations=observations).residual(values)
    for row, component in zip(grid, there, strict=True):
        rows = observations.component == component
        scale = 180 / np.pi if "PHASE" in component.name else 1.0
        data, response = scale * observations.value[rows], scale * values[rows]
        low, high = np.percentile(data, [2, 98])
        x = observations.position_m[observations.receiver_index[rows]] / 1e3
        y = np.log10(1 / observations.frequency_hz[observations.frequency_index[rows]])
        for axes, shown, limits, colours, name in (
            (row[0], data, (low, high), "turbo_r", f"{_TITLES[component]}: data"),
            (row[1], response, (low, high), "turbo_r", "response"),
            (row[2], residual[rows], (-3, 3), "RdBu", "residual / error"),
        ):
            points = axes.scatter(
                x, y, c=shown, vmin=limits[0], vmax=limits[1], cmap=colours, s=28, marker="s"
            )
            axes.set_title(name, fontsize=9)
            figure.colorbar(points, ax=axes)
        row[0].set_ylabel("log10 period (s)")
    grid[0, 0].invert_yaxis()
    for axes in grid[-1]:
        axes.set_xlabel("distance (km)")
    return figure


def fit_figure(observations: Observations, values: RealArray) -> Any:
    """Draw each station against period: data with their errors, the response as lines."""
    num = len(observations.position_m)
    columns = min(5, num)
    lines = -(-num // columns)
    figure = _matplotlib.Figure(figsize=(2.6 * columns, 3.4 * lines), layout="constrained")
    grid = figure.subplots(2 * lines, columns, squeeze=False, sharex=True, sharey="row")
    rms = Misfit(observations=observations).residual(values)
    for axes in grid.ravel():
        axes.set_visible(False)
    for receiver in range(num):
        line, column = divmod(receiver, columns)
        pair = (grid[2 * line, column], grid[2 * line + 1, column])
        mine = observations.receiver_index == receiver
        share = np.sqrt(np.mean(rms[mine] ** 2)) if mine.any() else np.nan
        pair[0].set_title(f"{observations.receiver_names[receiver]}  rms {share:.2f}", fontsize=8)
        for axes, kind in zip(pair, (0, 1), strict=True):
            axes.set_visible(True)
            axes.set_xscale("log")
            for first, colour in ((Component.TE_LOG10_RHO, "C3"), (Component.TM_LOG10_RHO, "C0")):
                _curve(axes, observations, values, mine, Component(first + kind), colour)
        if column == 0:
            pair[0].set_ylabel("log10 rho_a")
            pair[1].set_ylabel("phase (degrees)")
    grid[0, 0].legend(fontsize=7)
    figure.supxlabel("period (s)")
    return figure


def _curve(
    axes: Any,
    observations: Observations,
    values: RealArray,
    mine: np.ndarray,
    component: Component,
    colour: str,
) -> None:
    rows = np.flatnonzero(mine & (observations.component == component))
    if not len(rows):
        return
    period = 1 / observations.frequency_hz[observations.frequency_index[rows]]
    rows, period = rows[np.argsort(period)], np.sort(period)
    scale = 180 / np.pi if "PHASE" in component.name else 1.0
    axes.errorbar(
        period,
        scale * observations.value[rows],
        yerr=scale * observations.error[rows],
        fmt="o",
        color=colour,
        markersize=3,
        linewidth=0.8,
        label=component.name[:2],
    )
    axes.plot(period, scale * values[rows], "-", color=colour, linewidth=1)


def convergence_figure(history: Sequence[StepRecord], *, target_rms: float) -> Any:
    """Draw RMS and roughness against the step."""
    figure = _matplotlib.Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    steps = [record.step for record in history]
    axes.semilogy(steps, [record.rms for record in history], "o-", color="C0")
    axes.axhline(target_rms, color="C0", linestyle=":", label=f"target {target_rms:g}")
    axes.set_xlabel("step")
    axes.set_ylabel("RMS", color="C0")
    axes.set_xticks(steps)
    axes.legend()
    other = axes.twinx()
    other.plot(steps, [record.roughness for record in history], "s--", color="C1")
    other.set_ylabel("roughness", color="C1")
    return figure


def response_figure(observations: Observations) -> Any:
    """Draw the values of each component, period against distance.

    Raises:
        InversionError: no log10 rho, phase or tipper values to draw.
    """
    titles = _TITLES | {
        Component.TIPPER_REAL: "tipper, real part",
        Component.TIPPER_IMAG: "tipper, imaginary part",
    }
    there = [c for c in titles if (observations.component == c).any()]
    if not there:
        raise InversionError("pseudo-sections need log10 rho, phase or tipper values")
    lines = -(-len(there) // 2)
    figure = _matplotlib.Figure(figsize=(11, 2.9 * lines), layout="constrained")
    grid = figure.subplots(lines, 2, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in grid[len(there) :]:
        axes.set_visible(False)
    for axes, component in zip(grid, there, strict=False):
        rows = observations.component == component
        scale = 180 / np.pi if "PHASE" in component.name else 1.0
        points = axes.scatter(
            observations.position_m[observations.receiver_index[rows]] / 1e3,
            np.log10(1 / observations.frequency_hz[observations.frequency_index[rows]]),
            c=scale * observations.value[rows],
            cmap="turbo_r",
            s=28,
            marker="s",
        )
        axes.set_title(titles[component], fontsize=9)
        figure.colorbar(points, ax=axes)
    grid[0].invert_yaxis()
    figure.supxlabel("distance (km)")
    figure.supylabel("log10 period (s)")
    return figure
