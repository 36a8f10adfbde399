"""The linearized problem of one step, solved for any trade-off after one preparation.

Minimize |J (m - m_k) - r|^2 + t (m - m_ref)^T R (m - m_ref) with J and r in units of the errors.
In data space [Siripunvaraporn and Egbert 2000, Geophysics 65, 791-803, eq. 8]
m = m_ref + R^-1 J^T (J R^-1 J^T + t I)^-1 (r + J (m_k - m_ref)), a system of the size of the data.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.linear_solver import BandFactor, dense


@dataclass(frozen=True, kw_only=True)
class LinearStep:
    """One linearized inverse problem.

    Attributes:
        jacobian: (n_data, n_parameters), rows divided by the errors.
        residual: (n_data,) in units of the errors.
        root_weight: (n_data,) by which rows of both were multiplied, for robust misfits.
        roughness: R, sparse symmetric positive definite.
        departure: (n_parameters,) present model minus reference.
        reference: (n_parameters,).
    """

    jacobian: RealArray
    residual: RealArray
    root_weight: RealArray
    roughness: Any
    departure: RealArray
    reference: RealArray

    @cached_property
    def _factor(self) -> BandFactor:
        return BandFactor(self.roughness)

    @cached_property
    def _gram(self) -> RealArray:
        """J R^-1 J^T, (n_data, n_data)."""
        whitened = self._factor.whiten(self.jacobian.T)
        return whitened.T @ whitened  # one triangle is computed and mirrored

    @property
    def largest_trade_off(self) -> float:
        """The mean eigenvalue of J R^-1 J^T times the number of data: above it, no data count."""
        return float(np.trace(self._gram))

    def model(self, trade_off: float) -> RealArray:
        """Give the minimizing model, (n_parameters,), for one trade-off t > 0."""
        return self._solve(self.residual + self.jacobian @ self.departure, trade_off)

    def corrected(self, parameters: RealArray, residual: RealArray, trade_off: float) -> RealArray:
        """Give the minimizing model if the data curve away from this step's Jacobian.

        The Jacobian stays, the residual is that of another model near the end of the step: the
        simplified Newton method [Deuflhard 2004, section 2.1], which needs forward runs only.

        Args:
            parameters: (n_parameters,) of that model.
            residual: (n_data,) its residual in units of the errors, not reweighted.
            trade_off: t > 0.
        """
        ahead = self.jacobian @ (parameters - self.reference)
        return self._solve(self.root_weight * residual + ahead, trade_off)

    def _solve(self, wanted: RealArray, trade_off: float) -> RealArray:
        matrix = self._gram.copy()
        matrix[np.diag_indices_from(matrix)] += trade_off
        factor = dense.cho_factor(matrix, lower=True, overwrite_a=True, check_finite=False)
        weights = dense.cho_solve(factor, wanted)
        return self.reference + self._factor.solve(self.jacobian.T @ weights)
