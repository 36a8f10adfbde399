"""TE and TM responses of a 2-D section, one factorization for each frequency and mode.

TE:  -div grad Ex + i w mu_0 sigma Ex = 0 in air and ground, with Hy = 1 at the top of the air (a
     uniform source sheet), so that different sections on the left and right are both right.
TM:  -div(rho grad Hx) + i w mu_0 Hx = 0 from the highest ground down, with Hx = 1 at its top; cells
     of air in valleys keep Hx at 1 by their resistivity.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum

import numpy as np

from plait.errors import EarthError
from plait.magnetotellurics.arrays import ComplexArray, RealArray
from plait.magnetotellurics.earth import AIR_OHM_M, Mesh
from plait.magnetotellurics.elements import Elements, Stencil, te_elements, tm_elements
from plait.magnetotellurics.grid_operator import Grid, assemble, make_grid
from plait.magnetotellurics.linear_solver import Factor, dissection_order, factorize
from plait.magnetotellurics.receivers import (
    OnNode,
    Receivers,
    Row,
    place_receivers,
    te_rows,
    tm_row,
)
from plait.magnetotellurics.survey import MU_0


class Mode(Enum):
    """E-polarization (Ex, Zxy and the tipper) or H-polarization (Hx, Zyx)."""

    TE = "te"
    TM = "tm"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A mesh with receivers and frequencies; the model comes later."""

    mesh: Mesh
    receivers: Receivers
    frequency_hz: RealArray
    grids: dict[Mode, Grid]
    stencil: Stencil


def make_problem(
    mesh: Mesh,
    *,
    position_m: RealArray,
    frequency_hz: RealArray,
    stencil: Stencil = Stencil.FITTED,
    on_node: OnNode = OnNode.MEAN,
) -> Problem:
    """Place the receivers and lay out both modes' matrices.

    Raises:
        EarthError: a receiver outside the mesh, frequencies that are not positive.
    """
    if (np.asarray(frequency_hz) <= 0).any():
        raise EarthError("frequencies must be positive")
    return Problem(
        mesh=mesh,
        receivers=place_receivers(mesh, position_m, on_node=on_node),
        frequency_hz=np.asarray(frequency_hz, dtype=float),
        grids={
            Mode.TE: make_grid(width_m=mesh.width_m, thickness_m=np.diff(mesh.z_m)),
            Mode.TM: make_grid(width_m=mesh.width_m, thickness_m=mesh.ground_thickness_m),
        },
        stencil=stencil,
    )


@dataclass(frozen=True, kw_only=True)
class ModeSolution:
    """The field of one mode at one frequency, and what derivatives need of it.

    Attributes:
        mode: TE or TM.
        induction: i w mu_0.
        elements: coefficients of the mode's grid.
        field: (node_shape) Ex or Hx.
        factor: of the free nodes' matrix.
        impedance_ohm: (n_rx,) Zxy or Zyx.
        tipper: (n_rx,) Hz/Hy, NaN for TM.
        rows: Ex, Hy and Hz, or Ey alone.
    """

    mode: Mode
    induction: complex
    elements: Elements
    field: ComplexArray
    factor: Factor
    impedance_ohm: ComplexArray
    tipper: ComplexArray
    rows: tuple[Row, ...]


def solve_mode(
    problem: Problem, resistivity_ohm_m: RealArray, *, frequency_hz: float, mode: Mode
) -> ModeSolution:
    """Solve one mode at one frequency.

    Args:
        problem: mesh, receivers and grids.
        resistivity_ohm_m: mesh.ground_shape; values in terrain air are ignored.
        frequency_hz: any positive frequency.
        mode: TE or TM.

    Raises:
        EarthError: a resistivity of the wrong shape, or not positive and finite.
    """
    resistivity = _filled(problem.mesh, resistivity_ohm_m)
    induction = 2j * np.pi * frequency_hz * MU_0
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


def _solve_te(problem: Problem, resistivity: RealArray, induction: complex) -> ModeSolution:
    grid, mesh = problem.grids[Mode.TE], problem.mesh
    air = np.full((mesh.num_air, resistivity.shape[1]), 1 / AIR_OHM_M)
    sigma = np.concatenate([air, 1 / resistivity])
    elements = te_elements(
        sigma, thickness_m=grid.thickness_m, induction=induction, stencil=problem.stencil
    )
    factor = factorize(assemble(grid, elements), grid.order)
    source = np.zeros(grid.node_shape, dtype=np.complex128)
    # The flux out of the top is -dEx/dz = i w mu_0 Hy.
    source[0] = induction * grid.node_width_m
    field = factor.solve(source.ravel()).reshape(grid.node_shape)
    electric, magnetic, vertical = te_rows(
        problem.receivers, grid=grid, elements=elements, field=field, induction=induction
    )
    hy = magnetic.value(field)
    return ModeSolution(
        mode=Mode.TE,
        induction=induction,
        elements=elements,
        field=field,
        factor=factor,
        impedance_ohm=electric.value(field) / hy,
        tipper=vertical.value(field) / hy,
        rows=(electric, magnetic, vertical),
    )


def _solve_tm(problem: Problem, resistivity: RealArray, induction: complex) -> ModeSolution:
    grid, mesh = problem.grids[Mode.TM], problem.mesh
    elements = tm_elements(
        resistivity, thickness_m=grid.thickness_m, induction=induction, stencil=problem.stencil
    )
    matrix = assemble(grid, elements)
    top = grid.node_shape[1]
    order = dissection_order(grid.node_shape[0] - 1, top)
    factor = factorize(matrix[top:, top:], order)
    inner = factor.solve(-matrix[top:, :top] @ np.ones(top))
    field: ComplexArray = np.ones(grid.node_shape, dtype=np.complex128)
    field[1:] = inner.reshape(-1, top)
    row = tm_row(
        problem.receivers,
        grid=grid,
        elements=elements,
        field=field,
        first_row=mesh.num_air,
    )
    return ModeSolution(
        mode=Mode.TM,
        induction=induction,
        elements=elements,
        field=field,
        factor=factor,
        impedance_ohm=row.value(field),
        tipper=np.full(problem.receivers.num_receivers, np.nan + 0j),
        rows=(row,),
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
    tasks = [(f, mode) for f in range(shape[0]) for mode in modes]

    def one(task: tuple[int, Mode]) -> None:
        f, mode = task
        solution = solve_mode(
            problem, resistivity_ohm_m, frequency_hz=problem.frequency_hz[f], mode=mode
        )
        if mode is Mode.TE:
            te[f], tipper[f] = solution.impedance_ohm, solution.tipper
        else:
            tm[f] = solution.impedance_ohm

    with ThreadPoolExecutor(max_workers=num_workers) as pool:
        list(pool.map(one, tasks))
    return Responses(te_impedance_ohm=te, tm_impedance_ohm=tm, tipper=tipper)
