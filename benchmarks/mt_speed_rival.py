"""The rival of mt_speed: SimPEG's 2-D natural-source simulations on the same mesh and receivers.

SimPEG solves TM for the electric field in the plane (it calls the in-plane axis x, so its data are
Zxy) and TE for the magnetic field in the plane (its Zyx), one frequency after the other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pymatsolver
from discretize import TensorMesh
from scipy import sparse
from simpeg import (
    data,
    data_misfit,
    inverse_problem,
    inversion,
    maps,
    optimization,
    regularization,
)
from simpeg.electromagnetics import natural_source
from simpeg.utils import get_default_solver

from plait.magnetotellurics.forward_2d import Problem

_LOG10_AIR = 8.0  # what SimPEG's examples use; its edge elements do not stand much more
SOLVERS = {"SuperLU": "SolverLU", "MUMPS": "Mumps", "MKL Pardiso": "Pardiso"}


def solvers() -> dict[str, Any]:
    """SimPEG's direct solvers that are installed here, by name; the slowest first.

    SuperLU comes with it and is its default where nothing else is installed; otherwise its default
    is Pardiso, then MUMPS.
    """
    default = get_default_solver()
    found = {
        name: getattr(pymatsolver, attribute)
        for name, attribute in SOLVERS.items()
        if pymatsolver.AvailableSolvers[attribute]
    }
    return {
        f"{name}, its default here" if solver is default else name: solver
        for name, solver in found.items()
    }


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Both modes' simulations for a model of log10 rho of the ground, rows from the top."""

    simulations: list[Any]

    def forward(self, model: np.ndarray) -> list[np.ndarray]:
        """Compute apparent resistivities and phases anew, for TM and TE."""
        found = []
        for simulation in self.simulations:
            simulation.model = None
            found.append(simulation.dpred(model))
        return found

    def jacobian(self, model: np.ndarray) -> list[np.ndarray]:
        """Compute the explicit Jacobian from SimPEG's own factors and derivatives.

        The loop is that of its getJ, which in 0.25 fails for 2-D simulations where it adds the
        receivers' own derivative (its issue 1541): there the right sum is put.
        """
        found = []
        for simulation in self.simulations:
            simulation.model = None
            fields = simulation.fields(model)
            slices = simulation.survey.get_all_slices()
            jacobian = np.empty((simulation.survey.nD, len(model)))
            for factor, frequency in zip(
                simulation.Ainv, simulation.survey.frequencies, strict=True
            ):
                (source,) = simulation.survey.get_sources_by_frequency(frequency)
                field = fields[source, simulation._solutionType]
                for receiver in source.receiver_list:
                    by_field, by_model = receiver.evalDeriv(
                        source, simulation.mesh, fields, v=np.eye(receiver.nD), adjoint=True
                    )
                    adjoint = factor * by_field
                    total = -simulation.getADeriv(frequency, field, adjoint, adjoint=True)
                    total = total + simulation.getRHSDeriv(frequency, source, adjoint, adjoint=True)
                    jacobian[slices[source, receiver]] = np.real(total + by_model).T
            found.append(jacobian)
        return found

    def prepared_step(
        self, start: np.ndarray, observed: list[np.ndarray]
    ) -> Callable[[], np.ndarray]:
        """Prepare one step of SimPEG's inexact Gauss-Newton inversion with its default settings.

        The trade-off is that at which the largest slopes of misfit and regularization are equal, as
        its BetaEstimateMaxDerivative takes it; choosing it is not part of the step.
        """
        misfits = []
        for simulation, values in zip(self.simulations, observed, strict=True):
            simulation.model = None
            # 7 % of apparent resistivities, 2 degrees of phases, as ours.
            shaped = values.reshape(len(simulation.survey.frequencies), 2, -1)
            error = np.stack([0.07 * shaped[:, 0], np.full_like(shaped[:, 1], 2.0)], axis=1)
            measured = data.Data(
                simulation.survey, dobs=values, standard_deviation=np.abs(error).ravel()
            )
            misfits.append(data_misfit.L2DataMisfit(data=measured, simulation=simulation))
        misfit: Any = misfits[0] + misfits[1]
        mesh = self.simulations[0].mesh
        smooth = regularization.WeightedLeastSquares(
            mesh,
            active_cells=_is_ground(mesh),
            mapping=maps.IdentityMap(nP=len(start)),
            reference_model=start,
        )
        slope = np.abs(misfit.deriv(start))
        change = np.where(slope == slope.max(), start.max(), 0.0)
        beta = slope.max() / np.abs(smooth.deriv(start + change)).max()
        optimizer = optimization.InexactGaussNewton(maxIter=1)
        problem = inverse_problem.BaseInvProblem(misfit, smooth, optimizer, beta=beta)
        for simulation in self.simulations:
            simulation.model = None
        return partial(inversion.BaseInversion(problem).run, start)


def _is_ground(mesh: Any) -> np.ndarray:
    return mesh.cell_centers[:, 1] < 0


def make_rival(problem: Problem, position_m: np.ndarray, solver: Any) -> Rival:
    """Set up SimPEG's simulations for a flat problem."""
    mesh = TensorMesh(
        [problem.mesh.width_m, np.diff(problem.mesh.z_m)[::-1]],
        origin=[problem.mesh.y_m[0], -problem.mesh.z_m[-1]],
    )
    ground = _is_ground(mesh)
    log10_rho = maps.InjectActiveCells(mesh, ground, value_inactive=_LOG10_AIR)
    places = np.column_stack([position_m, np.full(len(position_m), -1e-3)])
    simulations = []
    for orientation, make in (
        ("xy", natural_source.Simulation2DElectricField),
        ("yx", natural_source.Simulation2DMagneticField),
    ):
        receivers = [
            natural_source.receivers.Impedance(places, orientation=orientation, component=part)
            for part in ("apparent_resistivity", "phase")
        ]
        sources = [natural_source.sources.Planewave(receivers, f) for f in problem.frequency_hz]
        sigma = (
            maps.ExpMap(nP=mesh.n_cells)
            * maps.LinearMap(-np.log(10) * sparse.eye_array(mesh.n_cells, format="csr"))
            * log10_rho
        )
        simulations.append(
            make(mesh, survey=natural_source.Survey(sources), sigmaMap=sigma, solver=solver)
        )
    return Rival(simulations=simulations)


def model_of(resistivity_ohm_m: np.ndarray) -> np.ndarray:
    """Give SimPEG's model vector: log10 rho of the ground, rows from below, columns fastest."""
    return np.log10(resistivity_ohm_m)[::-1].ravel()
