"""Derivatives of the data by log10 rho of every cell, by the adjoint of the 2-D equations.

For A(m) u = f and an output q(u, m) with dq = c^T du + (direct term), dq/dm = -l^T (dA/dm) u +
(direct term) with A^T l = c. A is symmetric, so the factor of the forward solve serves the adjoint
[McGillivray et al. 1994, Geophys. J. Int. 116, 759-770; Rodi and Mackie 2001, Geophysics 66, 174].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from plait.magnetotellurics.arrays import ComplexArray, RealArray
from plait.magnetotellurics.forward_2d import (
    FREQUENCIES_AT_ONCE,
    Mode,
    ModeSolution,
    Problem,
    solve_mode,
)
from plait.magnetotellurics.grid_operator import Grid, apply_change, derivative_by_cells
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.prediction import Task, predict_rows, tasks_of
from plait.magnetotellurics.receivers import Row
from plait.magnetotellurics.workers import map_in_threads

_LN10 = float(np.log(10.0))


@dataclass(frozen=True, kw_only=True)
class _Outputs:
    """One frequency of a part: the values of its data rows and their linear functionals.

    receiver picks the output of a row: n_rx outputs ln Z, then for TE n_rx outputs T.
    """

    task: Task
    values: RealArray
    slopes: ComplexArray
    output: np.ndarray


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some frequencies of one mode, solved together."""

    solution: ModeSolution
    outputs: list[_Outputs]


def predict(
    problem: Problem,
    resistivity_ohm_m: RealArray,
    observations: Observations,
    *,
    num_workers: int = 1,
) -> RealArray:
    """Give the predicted value of every datum, (n_data,), in the unit of its component."""
    values = np.empty(observations.num_data)

    def one(tasks: list[Task]) -> None:
        for outputs in _solve(problem, resistivity_ohm_m, observations, tasks).outputs:
            values[outputs.task.rows] = outputs.values

    map_in_threads(one, _together(tasks_of(problem, observations)), num_workers=num_workers)
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

    def one(tasks: list[Task]) -> None:
        part = _solve(problem, resistivity_ohm_m, observations, tasks)
        needed = [np.unique(outputs.output) for outputs in part.outputs]
        weights = np.zeros(
            (len(tasks), max(map(len, needed)), _num_outputs(problem, part.solution)), dtype=complex
        )
        for f, which in enumerate(needed):
            weights[f, np.arange(len(which)), which] = 1
        for f, k, sensitivity in _sensitivities(problem, part.solution, weights):
            outputs = part.outputs[f]
            if k >= len(needed[f]):
                continue
            for i in np.flatnonzero(outputs.output == needed[f][k]):
                jacobian[outputs.task.rows[i]] = _real_product(
                    _LN10 * outputs.slopes[i], sensitivity
                )
        for outputs in part.outputs:
            values[outputs.task.rows] = outputs.values

    map_in_threads(one, _together(tasks_of(problem, observations)), num_workers=num_workers)
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
        self._parts = map_in_threads(
            lambda tasks: _solve(problem, resistivity_ohm_m, observations, tasks),
            _together(tasks_of(problem, observations)),
            num_workers=num_workers,
        )
        self.values: RealArray = np.empty(observations.num_data)
        for part in self._parts:
            for outputs in part.outputs:
                self.values[outputs.task.rows] = outputs.values

    def times(self, change: RealArray) -> RealArray:
        """Give J v, (n_data,), for a change v of log10 rho, mesh.ground_shape."""
        found = np.empty_like(self.values)

        def one(part: _Part) -> None:
            changes = _changes_of_outputs(self._problem, part.solution, change)
            for outputs, changed in zip(part.outputs, changes, strict=True):
                found[outputs.task.rows] = _LN10 * np.real(outputs.slopes * changed[outputs.output])

        map_in_threads(one, self._parts, num_workers=self._num_workers)
        return found

    def transpose_times(self, weights: RealArray) -> RealArray:
        """Give J^T u, mesh.ground_shape, for weights u, (n_data,)."""

        def one(part: _Part) -> RealArray:
            combined = np.zeros(
                (len(part.outputs), 1, _num_outputs(self._problem, part.solution)), dtype=complex
            )
            for f, outputs in enumerate(part.outputs):
                np.add.at(
                    combined[f, 0], outputs.output, weights[outputs.task.rows] * outputs.slopes
                )
            total = np.zeros(int(np.prod(self._problem.mesh.ground_shape)))
            for _, _, sensitivity in _sensitivities(self._problem, part.solution, combined):
                total += sensitivity.real
            return total

        gradients = map_in_threads(one, self._parts, num_workers=self._num_workers)
        return _LN10 * np.sum(gradients, axis=0).reshape(self._problem.mesh.ground_shape)


def _together(tasks: list[Task]) -> list[list[Task]]:
    """Put the frequencies that are solved together into lists."""
    found = []
    for mode in Mode:
        of_mode = [task for task in tasks if task.mode is mode]
        found += [
            of_mode[i : i + FREQUENCIES_AT_ONCE]
            for i in range(0, len(of_mode), FREQUENCIES_AT_ONCE)
        ]
    return found


def _solve(
    problem: Problem, resistivity_ohm_m: RealArray, observations: Observations, tasks: list[Task]
) -> _Part:
    frequency = problem.frequency_hz[[task.frequency_index for task in tasks]]
    solution = solve_mode(problem, resistivity_ohm_m, frequency_hz=frequency, mode=tasks[0].mode)
    found = []
    for f, task in enumerate(tasks):
        receiver = observations.receiver_index[task.rows]
        component = observations.component[task.rows]
        values, slopes = predict_rows(
            component,
            impedance=solution.impedance_ohm[f, receiver],
            tipper=solution.tipper[f, receiver],
            frequency_hz=frequency[f],
        )
        is_tipper = component >= Component.TIPPER_REAL
        output = receiver + is_tipper * problem.receivers.num_receivers
        found.append(_Outputs(task=task, values=values, slopes=slopes, output=output))
    return _Part(solution=solution, outputs=found)


def _num_outputs(problem: Problem, solution: ModeSolution) -> int:
    return problem.receivers.num_receivers * (2 if solution.mode is Mode.TE else 1)


def _functionals(solution: ModeSolution, f: int) -> list[list[tuple[Row, ComplexArray]]]:
    """For ln Z and for T: rows and per-receiver factors whose sum is the linearized output."""
    if solution.mode is Mode.TM:
        (electric,) = solution.rows[f]
        return [[(electric, 1 / solution.impedance_ohm[f])]]
    electric, magnetic, vertical = solution.rows[f]
    field = solution.field[f]
    hy = magnetic.value(field)
    return [
        [(electric, 1 / electric.value(field)), (magnetic, -1 / hy)],
        [(vertical, 1 / hy), (magnetic, -solution.tipper[f] / hy)],
    ]


def _right_hand_sides(
    problem: Problem, solution: ModeSolution, f: int, weights: ComplexArray
) -> tuple[ComplexArray, ComplexArray]:
    """Combine outputs: weights (n, n_outputs) give c (n, n_nodes) and direct terms (n, n_cells)."""
    grid = problem.grids[solution.mode]
    num_rx = problem.receivers.num_receivers
    sides = np.zeros((len(weights), solution.field[f].size), dtype=np.complex128)
    direct = np.zeros(
        (len(weights), len(grid.thickness_m) * len(grid.width_m)), dtype=np.complex128
    )
    for kind, functional in enumerate(_functionals(solution, f)):
        share = weights[:, kind * num_rx : (kind + 1) * num_rx]
        for k, r in np.argwhere(share):
            for row, factor in functional:
                scale = share[k, r] * factor[r]
                # Nodes and cells of one row differ from each other, so that += adds them all.
                sides[k, row.node[r]] += scale * row.weight[r]
                direct[k, row.direct_cell[r]] += scale * row.direct_weight[r]
    return sides, direct


def _sensitivities(
    problem: Problem, solution: ModeSolution, weights: ComplexArray
) -> Iterator[tuple[int, int, ComplexArray]]:
    """Give the derivatives by ln rho of weighted sums of outputs, by one batch of adjoint solves.

    Args:
        problem: the problem.
        solution: of one mode at n_freq frequencies.
        weights: (n_freq, n, n_outputs).

    Yields:
        The frequency, the sum among the n, and its derivative (n_ground cells,).
    """
    grid = problem.grids[solution.mode]
    num_frequencies, num_sums = weights.shape[:2]
    sides = np.empty((num_frequencies, num_sums, *grid.node_shape), dtype=np.complex128)
    direct = []
    for f in range(num_frequencies):
        right, own = _right_hand_sides(problem, solution, f, weights[f])
        sides[f] = right.reshape(sides[f].shape)
        direct.append(own.reshape(num_sums, len(grid.thickness_m), len(grid.width_m)))
    adjoint = _solve_free(grid, solution, sides)
    ground = slice(-problem.mesh.ground_shape[0], None)
    for f in range(num_frequencies):
        elements = solution.elements.at(f)
        for k in range(num_sums):
            found = derivative_by_cells(
                grid, elements, field=solution.field[f], adjoint=adjoint[f, k]
            )
            found = (direct[f][k] - found)[ground] * problem.mesh.is_ground
            yield f, k, found.ravel()


def _solve_free(grid: Grid, solution: ModeSolution, sides: ComplexArray) -> ComplexArray:
    """Solve for (n_freq, n, *node_shape), with zeros on a top row whose field is given."""
    first = grid.first_free_row
    found = np.zeros_like(sides)
    found[:, :, first:] = solution.factor.solve(sides[:, :, first:])
    return found


def _real_product(factor: complex, values: ComplexArray) -> RealArray:
    return factor.real * values.real - factor.imag * values.imag


def _changes_of_outputs(
    problem: Problem, solution: ModeSolution, change: RealArray
) -> list[ComplexArray]:
    """Give d ln Z (and d T after it for TE) at each frequency for a change of ln rho."""
    grid = problem.grids[solution.mode]
    full = np.zeros((len(grid.thickness_m), len(grid.width_m)))
    full[-problem.mesh.ground_shape[0] :] = change * problem.mesh.is_ground
    right = [
        apply_change(grid, solution.elements.at(f), field=field, change=full)
        for f, field in enumerate(solution.field)
    ]
    tangents = -_solve_free(grid, solution, np.array(right)[:, None])[:, 0]
    found = []
    for f, tangent in enumerate(tangents):
        outputs = []
        for functional in _functionals(solution, f):
            total = np.zeros(problem.receivers.num_receivers, dtype=np.complex128)
            for row, factor in functional:
                direct = (row.direct_weight * full.ravel()[row.direct_cell]).sum(axis=1)
                total += factor * (row.value(tangent) + direct)
            outputs.append(total)
        found.append(np.concatenate(outputs))
    return found
