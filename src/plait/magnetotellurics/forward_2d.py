"""TE and TM responses of a 2-D section, one factorization for each frequency and mode.

TE:  -div grad Ex + i w mu_0 sigma Ex = 0 in air and ground, with Hy = 1 at the top of the air (a
     uniform source sheet), so that different sections on the left and right are both right.
TM:  -div(rho grad Hx) + i w mu_0 Hx = 0 from the highest ground down, with Hx = 1 at its top; cells
     of air in valleys keep Hx at 1 by their resistivity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from plait.errors import EarthError
from plait.magnetotellurics.arrays import ComplexArray, RealArray
from plait.magnetotellurics.earth import AIR_OHM_M, Mesh
from plait.magnetotellurics.elements import Elements, Stencil, te_elements, tm_elements
from plait.magnetotellurics.grid_factor import GridFactor, GridMatrix
from plait.magnetotellurics.grid_operator import Grid, assemble, make_grid
from plait.magnetotellurics.receivers import (
    OnNode,
    Receivers,
    Row,
    place_receivers,
    te_rows,
    tm_row,
)
from plait.magnetotellurics.survey import MU_0
from plait.magnetotellurics.workers import map_in_threads

# One batch of the factorization. Fitted: more are hardly faster and their factors need memory.
FREQUENCIES_AT_ONCE = 5


class Mode(Enum):
    """E-polarization (Ex, Zxy and the tipper) or H-polarization (Hx, Zyx)."""

    TE = "te"
    TM = "tm"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A mesh with receivers and frequencies; the model comes later.

    device is where PyTorch factorizes and solves: "cpu", or a GPU by PyTorch's name for it.
    """

    mesh: Mesh
    receivers: Receivers
    frequency_hz: RealArray
    grids: dict[Mode, Grid]
    stencil: Stencil
    device: str = "cpu"


def make_problem(
    mesh: Mesh,
    *,
    position_m: RealArray,
    frequency_hz: RealArray,
    stencil: Stencil = Stencil.FITTED,
    on_node: OnNode = OnNode.MEAN,
    device: str = "cpu",
) -> Problem:
    """Place the receivers and lay out both modes' matrices.

    Raises:
        EarthError: a receiver outside the mesh, frequencies that are not positive, a device that
            PyTorch does not have here or that lacks complex128.
    """
    if (np.asarray(frequency_hz) <= 0).any():
        raise EarthError("frequencies must be positive")
    try:
        torch.zeros(1, dtype=torch.complex128, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise EarthError(f"device {device!r} cannot be used: {reason}") from error
    return Problem(
        mesh=mesh,
        receivers=place_receivers(mesh, position_m, on_node=on_node),
        frequency_hz=np.asarray(frequency_hz, dtype=float),
        grids={
            Mode.TE: make_grid(
                width_m=mesh.width_m, thickness_m=np.diff(mesh.z_m), top_is_given=False
            ),
            Mode.TM: make_grid(
                width_m=mesh.width_m, thickness_m=mesh.ground_thickness_m, top_is_given=True
            ),
        },
        stencil=stencil,
        device=device,
    )


@dataclass(frozen=True, kw_only=True)
class ModeSolution:
    """The fields of one mode at several frequencies, and what derivatives need of them.

    Attributes:
        mode: TE or TM.
        elements: coefficients of the mode's grid.
        field: (n_freq, *node_shape) Ex or Hx.
        factor: of the free nodes' matrices.
        impedance_ohm: (n_freq, n_rx) Zxy or Zyx.
        tipper: (n_freq, n_rx) Hz/Hy, NaN for TM.
        rows: of each frequency: Ex, Hy and Hz, or Ey alone.
    """

    mode: Mode
    elements: Elements
    field: ComplexArray
    factor: GridFactor
    impedance_ohm: ComplexArray
    tipper: ComplexArray
    rows: list[tuple[Row, ...]]


def solve_mode(
    problem: Problem, resistivity_ohm_m: RealArray, *, frequency_hz: RealArray, mode: Mode
) -> ModeSolution:
    """Solve one mode at several frequencies together.

    Args:
        problem: mesh, receivers and grids.
        resistivity_ohm_m: mesh.ground_shape; values in terrain air are ignored.
        frequency_hz: (n_freq,) any positive frequencies.
        mode: TE or TM.

    Raises:
        EarthError: a resistivity of the wrong shape, or not positive and finite.
    """
    resistivity = _filled(problem.mesh, resistivity_ohm_m)
    induction = np.asarray(2j * np.pi * MU_0 * np.asarray(frequency_hz), dtype=np.complex128)
    solve = _solve_te if mode is Mode.TE else _solve_tm
    return solve(problem, resistivity, induction)


def _filled(mesh: Mesh, resistivity_ohm_m: RealArray) -> RealArray:
    if resistivity_ohm_m.shape != mesh.ground_shape:
        raise EarthError(
            f"the resistivity has shape {resistivity_ohm_m.shape}, the mesh {mesh.ground_shape}"
        )
    filled = np.where(mesh.is_ground, resistivity_ohm_m, AIR_OHM_M)
    if not (np.isfinite(filled) & (filled > 0)).all():
        raise EarthError("resistivities must be positive and finite")
    return filled


def _solve_te(problem: Problem, resistivity: RealArray, induction: ComplexArray) -> ModeSolution:
    grid, mesh = problem.grids[Mode.TE], problem.mesh
    air = np.full((mesh.num_air, resistivity.shape[1]), 1 / AIR_OHM_M)
    sigma = np.concatenate([air, 1 / resistivity])
    elements = te_elements(
        sigma, thickness_m=grid.thickness_m, induction=induction, stencil=problem.stencil
    )
    factor = GridFactor(assemble(grid, elements), grid.plan, device=problem.device)
    source = np.zeros((len(induction), 1, *grid.node_shape), dtype=np.complex128)
    # The flux out of the top is -dEx/dz = i w mu_0 Hy.
    source[:, 0, 0] = induction[:, None] * grid.node_width_m
    field = factor.solve(source)[:, 0]
    rows = [
        te_rows(
            problem.receivers, grid=grid, elements=elements.at(f), field=field[f], induction=i_w_mu
        )
        for f, i_w_mu in enumerate(induction)
    ]
    ex, hy, hz = (
        np.array([row[i].value(u) for row, u in zip(rows, field, strict=True)]) for i in range(3)
    )
    return ModeSolution(
        mode=Mode.TE,
        elements=elements,
        field=field,
        factor=factor,
        impedance_ohm=ex / hy,
        tipper=hz / hy,
        rows=list(rows),
    )


def _solve_tm(problem: Problem, resistivity: RealArray, induction: ComplexArray) -> ModeSolution:
    grid, mesh = problem.grids[Mode.TM], problem.mesh
    elements = tm_elements(
        resistivity, thickness_m=grid.thickness_m, induction=induction, stencil=problem.stencil
    )
    matrix = assemble(grid, elements)
    factor = GridFactor(
        GridMatrix(values=matrix.values[:, :, 1:]), grid.plan, device=problem.device
    )
    field = np.ones((len(induction), *grid.node_shape), dtype=np.complex128)
    source = np.zeros_like(field[:, None, 1:])
    source[:, 0, 0] = -matrix.values[:, 2, 0]  # what couples to the given row of ones
    field[:, 1:] = factor.solve(source)[:, 0]
    rows = [
        tm_row(
            problem.receivers,
            grid=grid,
            elements=elements.at(f),
            field=field[f],
            first_row=mesh.num_air,
        )
        for f in range(len(induction))
    ]
    impedance = np.array([row.value(u) for row, u in zip(rows, field, strict=True)])
    return ModeSolution(
        mode=Mode.TM,
        elements=elements,
        field=field,
        factor=factor,
        impedance_ohm=impedance,
        tipper=np.full(impedance.shape, np.nan + 0j),
        rows=[(row,) for row in rows],
    )


@dataclass(frozen=True, kw_only=True)
class Responses:
    """Impedances and tipper of a section, each (n_freq, n_rx), NaN where not computed."""

    te_impedance_ohm: ComplexArray
    tm_impedance_ohm: ComplexArray
    tipper: ComplexArray


def respond(
    problem: Problem,
    resistivity_ohm_m: RealArray,
    *,
    modes: Sequence[Mode] = (Mode.TE, Mode.TM),
    num_workers: int = 1,
) -> Responses:
    """Compute the responses of a section at every frequency of the problem.

    Args:
        problem: mesh, receivers, frequencies.
        resistivity_ohm_m: mesh.ground_shape.
        modes: what to compute.
        num_workers: threads; the result does not depend on it.
    """
    shape = (len(problem.frequency_hz), problem.receivers.num_receivers)
    te, tm, tipper = (np.full(shape, np.nan + 0j) for _ in range(3))
    starts = range(0, shape[0], FREQUENCIES_AT_ONCE)
    tasks = [(slice(f, f + FREQUENCIES_AT_ONCE), mode) for mode in modes for f in starts]

    def one(task: tuple[slice, Mode]) -> None:
        chosen, mode = task
        solution = solve_mode(
            problem, resistivity_ohm_m, frequency_hz=problem.frequency_hz[chosen], mode=mode
        )
        if mode is Mode.TE:
            te[chosen], tipper[chosen] = solution.impedance_ohm, solution.tipper
        else:
            tm[chosen] = solution.impedance_ohm

    map_in_threads(one, tasks, num_workers=num_workers)
    return Responses(te_impedance_ohm=te, tm_impedance_ohm=tm, tipper=tipper)
