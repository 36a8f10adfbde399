"""What the data resolve around a model, by the linearized problem.

With |J dm - r|^2 + t dm^T R dm the posterior covariance is (J^T J + t R)^-1, by the matrix
inversion lemma (R^-1 - R^-1 J^T (J R^-1 J^T + t I)^-1 J R^-1) / t [Tarantola 2005, section 3.2].
"""

from dataclasses import dataclass

import numpy as np

from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.linear_solver import BandFactor, dense
from plait.magnetotellurics.linear_step import LinearStep

_BLOCK = 500  # columns of R^-1 at once


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Linearized uncertainty of every parameter.

    Attributes:
        deviation: (n_parameters,) posterior standard deviation, in the parameters' unit. It holds
            for the chosen roughness and trade-off: it is the spread of equally smooth models.
        reference_share: (n_parameters,) how much of a uniform change of the reference model shows
            up in the result: 0 where the data decide, 1 where the reference does; the linearized
            depth-of-investigation index of Oldenburg and Li [1999, Geophysics 64, 403].
    """

    deviation: RealArray
    reference_share: RealArray


def posterior_of(step: LinearStep, *, trade_off: float) -> Posterior:
    """Compute the diagonal of the posterior covariance and the index, near the step's model."""
    factor = BandFactor(step.roughness)
    smoothed = factor.solve(np.ascontiguousarray(step.jacobian.T))
    gram = step.jacobian @ smoothed
    gram = (gram + gram.T) / 2 + trade_off * np.eye(len(gram))
    lower = dense.cholesky(gram, lower=True, check_finite=False)
    reduced = dense.solve_triangular(lower, smoothed.T, lower=True, check_finite=False)
    count = step.jacobian.shape[1]
    prior = np.empty(count)
    for first in range(0, count, _BLOCK):
        last = min(first + _BLOCK, count)
        unit = np.zeros((count, last - first))
        unit[np.arange(first, last), np.arange(last - first)] = 1.0
        prior[first:last] = factor.solve(unit)[np.arange(first, last), np.arange(last - first)]
    variance = (prior - (reduced**2).sum(axis=0)) / trade_off
    along = dense.cho_solve((lower, True), step.jacobian @ np.ones(count))
    return Posterior(
        deviation=np.sqrt(np.maximum(variance, 0.0)),
        reference_share=1.0 - smoothed @ along,
    )
