"""What an inversion minimizes beside the misfit, and its quadratic form near a model.

A smooth inversion has one quadratic for all models; a learnt prior (coded_section.py) has another
one at each model, since its section is a curved function of the codes.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.linear_solver import sparse


@dataclass(frozen=True, kw_only=True)
class Quadratic:
    """(x - reference)^T matrix (x - reference), up to a constant; matrix sparse and positive."""

    matrix: Any
    reference: RealArray


class Penalty(Protocol):
    """Size of a model in the prior's terms."""

    def value(self, parameters: RealArray) -> float:
        """Give the penalty of a model."""
        ...

    def near(self, parameters: RealArray) -> Quadratic:
        """Give the quadratic with the penalty's gradient, and its curvature to first order."""
        ...


@dataclass(frozen=True, kw_only=True)
class RoughnessPenalty:
    """Roughness of (parameters - reference), the same quadratic at every model."""

    matrix: Any
    reference: RealArray

    def value(self, parameters: RealArray) -> float:
        """Give (m - m_ref)^T R (m - m_ref)."""
        change = parameters - self.reference
        return float(change @ (self.matrix @ change))

    def near(self, parameters: RealArray) -> Quadratic:
        """Give R and the reference."""
        del parameters
        return Quadratic(matrix=self.matrix, reference=self.reference)


@dataclass(frozen=True, kw_only=True)
class PenaltyWithShifts:
    """Another penalty with weight * s^2 for each static shift s at the end of the parameters."""

    inner: Penalty
    num_shifts: int
    weight: float

    def value(self, parameters: RealArray) -> float:
        """Give the sum of both."""
        split = len(parameters) - self.num_shifts
        shifts = parameters[split:]
        return self.inner.value(parameters[:split]) + self.weight * float(shifts @ shifts)

    def near(self, parameters: RealArray) -> Quadratic:
        """Give both quadratics side by side."""
        inner = self.inner.near(parameters[: len(parameters) - self.num_shifts])
        shifts = self.weight * sparse.eye_array(self.num_shifts, format="csr")
        return Quadratic(
            matrix=sparse.block_diag((inner.matrix, shifts), format="csc"),
            reference=np.concatenate([inner.reference, np.zeros(self.num_shifts)]),
        )
