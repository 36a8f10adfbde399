"""Derivatives of the data by log10 rho of every cell, by the adjoint of the 2-D equations.

For A(m) u = f and an output q(u, m) with dq = c^T du + (direct term), dq/dm = -l^T (dA/dm) u +
(direct term) with A^T l = c. A is symmetric, so the factor of the forward solve serves the adjoint
[McGillivray et al. 1994, Geophys. J. Int. 116, 759-770; Rodi and Mackie 2001, Geophysics 66, 174].
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from plait.magnetotellurics.arrays import ComplexArray, RealArray
from plait.magnetotellurics.forward_2d import Mode, ModeSolution, Problem, solve_mode
from plait.magnetotellurics.grid_operator import apply_change, derivative_by_cells
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.prediction import Task, predict_rows, tasks_of
from plait.magnetotellurics.receivers import Row

_LN10 = float(np.log(10.0))


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One solved task: its values and the linear functionals of its data rows.

    receiver picks the output of a row: n_rx outputs ln Z, then for TE n_rx outputs T.
    """

    task: Task
    solution: ModeSolution
    values: RealArray
    slopes: ComplexArray
    output: np.ndarray


def predict(
    problem: Problem,
    resistivity_ohm_m: RealArray,
    observations: Observations,
    *,
    num_workers: int = 1,
) -> RealArray:
    """Give the predicted value of every datum, (n_data,), in the unit of its component."""
    values = np.empty(observations.num_data)

    def one(task: Task) -> None:
        values[task.rows] = _solve(problem, resistivity_ohm_m, observations, task).values

    with ThreadPoolExecutor(max_workers=num_workers) as pool:
        list(pool.map(one, tasks_of(problem, observations)))
    return values


@dataclass(frozen=True, kw_only=True)
class DenseSensitivity:
    """Predicted values (n_data,) and jacobian (n_data, n_ground cells), d value / d log10 rho."""

    values: RealArray
    jacobian: RealArray


def dense_sensitivity(
    problem: Problem,
    resistivity_ohm_m: RealArray,
    observations: Observations,
    *,
    num_workers: int = 1,
) -> DenseSensitivity:
    """Compute values and the explicit Jacobian; cells in row-major order of mesh.ground_shape.

    One factorization and one adjoint solve per receiver and output for each mode and frequency.
    Factors are dropped as soon as they have served.
    """
    num_cells = int(np.prod(problem.mesh.ground_shape))
    values = np.empty(observations.num_data)
    jacobian = np.empty((observations.num_data, num_cells))

    def one(task: Task) -> None:
        part = _solve(problem, resistivity_ohm_m, observations, task)
        outputs, where = np.unique(part.output, return_inverse=True)
        sensitivity = _output_sensitivity(problem, part.solution, outputs)
        values[task.rows] = part.values
        jacobian[task.rows] = _LN10 * np.real(part.slopes[:, None] * sensitivity[where])

    with ThreadPoolExecutor(max_workers=num_workers) as pool:
        list(pool.map(one, tasks_of(problem, observations)))
    return DenseSensitivity(values=values, jacobian=jacobian)


class Linearization:
    """The data near one model: values, J v and J^T u without an explicit Jacobian.

    It keeps one factorization for each mode and frequency, so its memory grows with their number.
    """

    def __init__(
        self,
        problem: Problem,
        resistivity_ohm_m: RealArray,
        observations: Observations,
        *,
        num_workers: int = 1,
    ) -> None:
        self._problem = problem
        self._num_workers = num_workers
        with ThreadPoolExecutor(max_workers=num_workers) as pool:
            self._parts = list(
                pool.map(
                    lambda task: _solve(problem, resistivity_ohm_m, observations, task),
                    tasks_of(problem, observations),
                )
            )
        self.values: RealArray = np.empty(observations.num_data)
        for part in self._parts:
            self.values[part.task.rows] = part.values

    def times(self, change: RealArray) -> RealArray:
        """Give J v, (n_data,), for a change v of log10 rho, mesh.ground_shape."""
        found = np.empty_like(self.values)

        def one(part: _Part) -> None:
            outputs = _outputs_of_change(self._problem, part.solution, change)
            found[part.task.rows] = _LN10 * np.real(part.slopes * outputs[part.output])

        with ThreadPoolExecutor(max_workers=self._num_workers) as pool:
            list(pool.map(one, self._parts))
        return found

    def transpose_times(self, weights: RealArray) -> RealArray:
        """Give J^T u, mesh.ground_shape, for weights u, (n_data,)."""

        def one(part: _Part) -> RealArray:
            combined = np.zeros(_num_outputs(self._problem, part.solution), dtype=np.complex128)
            np.add.at(combined, part.output, weights[part.task.rows] * part.slopes)
            return np.real(_combined_sensitivity(self._problem, part.solution, combined))

        with ThreadPoolExecutor(max_workers=self._num_workers) as pool:
            gradients = list(pool.map(one, self._parts))
        return _LN10 * np.sum(gradients, axis=0).reshape(self._problem.mesh.ground_shape)


def _solve(
    problem: Problem, resistivity_ohm_m: RealArray, observations: Observations, task: Task
) -> _Part:
    frequency = problem.frequency_hz[task.frequency_index]
    solution = solve_mode(problem, resistivity_ohm_m, frequency_hz=frequency, mode=task.mode)
    receiver = observations.receiver_index[task.rows]
    component = observations.component[task.rows]
    values, slopes = predict_rows(
        component,
        impedance=solution.impedance_ohm[receiver],
        tipper=solution.tipper[receiver],
        frequency_hz=frequency,
    )
    is_tipper = component >= Component.TIPPER_REAL
    output = receiver + is_tipper * problem.receivers.num_receivers
    return _Part(task=task, solution=solution, values=values, slopes=slopes, output=output)


def _num_outputs(problem: Problem, solution: ModeSolution) -> int:
    return problem.receivers.num_receivers * (2 if solution.mode is Mode.TE else 1)


def _functionals(solution: ModeSolution) -> list[list[tuple[Row, ComplexArray]]]:
    """For ln Z and for T: rows and per-receiver factors whose sum is the linearized output."""
    if solution.mode is Mode.TM:
        (electric,) = solution.rows
        return [[(electric, 1 / solution.impedance_ohm)]]
    electric, magnetic, vertical = solution.rows
    hy = magnetic.value(solution.field)
    return [
        [(electric, 1 / electric.value(solution.field)), (magnetic, -1 / hy)],
        [(vertical, 1 / hy), (magnetic, -solution.tipper / hy)],
    ]


def _right_hand_sides(
    problem: Problem, solution: ModeSolution, weights: ComplexArray
) -> tuple[ComplexArray, ComplexArray]:
    """Combine outputs: weights (n, n_outputs) give c (n, n_nodes) and direct terms (n, n_cells)."""
    grid = problem.grids[solution.mode]
    num_rx = problem.receivers.num_receivers
    sides = np.zeros((len(weights), solution.field.size), dtype=np.complex128)
    direct = np.zeros(
        (len(weights), len(grid.thickness_m) * len(grid.width_m)), dtype=np.complex128
    )
    for kind, functional in enumerate(_functionals(solution)):
        share = weights[:, kind * num_rx : (kind + 1) * num_rx]
        if not share.any():
            continue
        for row, factor in functional:
            for r in np.flatnonzero(share.any(axis=0)):
                scale = share[:, r, None] * factor[r]
                # Nodes and cells of one row differ from each other, so that += adds them all.
                sides[:, row.node[r]] += scale * row.weight[r]
                direct[:, row.direct_cell[r]] += scale * row.direct_weight[r]
    return sides, direct


def _adjoint_sensitivity(
    problem: Problem, solution: ModeSolution, weights: ComplexArray
) -> ComplexArray:
    """Give the derivative by ln rho of weighted sums of outputs, (n, n_ground cells)."""
    grid = problem.grids[solution.mode]
    sides, direct = _right_hand_sides(problem, solution, weights)
    free = _free_nodes(solution, grid.node_shape[1])
    adjoint = np.zeros_like(sides)
    adjoint[:, free] = solution.factor.solve(sides[:, free].T).T
    found = -derivative_by_cells(
        grid,
        solution.elements,
        field=solution.field,
        adjoint=adjoint.reshape(len(weights), *grid.node_shape),
    )
    found += direct.reshape(found.shape)
    ground = found[:, -problem.mesh.ground_shape[0] :] * problem.mesh.is_ground
    return ground.reshape(len(weights), -1)


def _free_nodes(solution: ModeSolution, num_columns: int) -> slice:
    """TM holds the top row of nodes at 1."""
    return slice(num_columns, None) if solution.mode is Mode.TM else slice(None)


def _output_sensitivity(
    problem: Problem, solution: ModeSolution, outputs: np.ndarray
) -> ComplexArray:
    weights = np.zeros((len(outputs), _num_outputs(problem, solution)), dtype=np.complex128)
    weights[np.arange(len(outputs)), outputs] = 1
    return _adjoint_sensitivity(problem, solution, weights)


def _combined_sensitivity(
    problem: Problem, solution: ModeSolution, weights: ComplexArray
) -> ComplexArray:
    return _adjoint_sensitivity(problem, solution, weights[None])[0]


def _outputs_of_change(problem: Problem, solution: ModeSolution, change: RealArray) -> ComplexArray:
    """Give d ln Z (and d T after it for TE) for a change of ln rho, by one tangent solve."""
    grid = problem.grids[solution.mode]
    full = np.zeros((len(grid.thickness_m), len(grid.width_m)))
    full[-problem.mesh.ground_shape[0] :] = change * problem.mesh.is_ground
    right = apply_change(grid, solution.elements, field=solution.field, change=full)
    free = _free_nodes(solution, grid.node_shape[1])
    tangent = np.zeros(solution.field.size, dtype=np.complex128)
    tangent[free] = -solution.factor.solve(right.ravel()[free])
    outputs = []
    for functional in _functionals(solution):
        total = np.zeros(problem.receivers.num_receivers, dtype=np.complex128)
        for row, factor in functional:
            direct = (row.direct_weight * full.ravel()[row.direct_cell]).sum(axis=1)
            total += factor * (row.value(tangent) + direct)
        outputs.append(total)
    return np.concatenate(outputs)
