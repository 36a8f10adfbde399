"""What the data resolve around a model, by the linearized problem.

With |J dm - r|^2 + t dm^T R dm the posterior covariance is (J^T J + t R)^-1, by the matrix
inversion lemma (R^-1 - R^-1 J^T (J R^-1 J^T + t I)^-1 J R^-1) / t [Tarantola 2005, section 3.2].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.linear_solver import BandFactor, dense, sparse
from plait.magnetotellurics.linear_step import LinearStep

_BLOCK = 500  # rows at once


@dataclass(frozen=True, kw_only=True)
class Posterior:
    """Linearized uncertainty of a model.

    Attributes:
        deviation: posterior standard deviation of the parameters, or of what a slope makes of
            them. It holds for the chosen penalty and trade-off: it is the spread of models that the
            penalty likes as much.
        reference_share: (n_parameters,) how much of a uniform change of the reference model shows
            up in the result: 0 where the data decide, 1 where the reference does; the linearized
            depth-of-investigation index of Oldenburg and Li [1999, Geophysics 64, 403].
    """

    deviation: RealArray
    reference_share: RealArray


def posterior_of(
    step: LinearStep, *, trade_off: float, slope: Any = None, num_changed: int | None = None
) -> Posterior:
    """Compute the diagonal of the posterior covariance and the index, near the step's model.

    Args:
        step: the linearized problem.
        trade_off: t of the penalty.
        slope: sparse (n, n_parameters) of n quantities whose deviation is wanted, as cells of a
            coded section; None for the parameters themselves.
        num_changed: how many parameters, from the first on, the index changes in the reference;
            None for all.
    """
    factor = BandFactor(step.roughness)
    smoothed = factor.solve(np.ascontiguousarray(step.jacobian.T))
    gram = step.jacobian @ smoothed
    gram = (gram + gram.T) / 2 + trade_off * np.eye(len(gram))
    lower = dense.cholesky(gram, lower=True, check_finite=False)
    count = step.jacobian.shape[1]
    rows = sparse.csr_array(sparse.eye_array(count, format="csr") if slope is None else slope)
    seen = dense.solve_triangular(lower, (rows @ smoothed).T, lower=True, check_finite=False)
    prior = np.empty(rows.shape[0])
    for first in range(0, len(prior), _BLOCK):
        block = rows[first : first + _BLOCK].toarray()
        prior[first : first + _BLOCK] = (block * factor.solve(block.T).T).sum(axis=1)
    variance = (prior - (seen**2).sum(axis=0)) / trade_off
    change = (np.arange(count) < (count if num_changed is None else num_changed)).astype(float)
    along = dense.cho_solve((lower, True), step.jacobian @ change)
    return Posterior(
        deviation=np.sqrt(np.maximum(variance, 0.0)),
        reference_share=change - smoothed @ along,
    )
