"""What an inversion with a learnt prior minimizes beside the misfit: roughness, codes, their edges.

Codes of neighbours are compared by first differences, which say that a body goes on as it is, or by
second ones, which say that its boundaries go on dipping as they do. Where neighbours lie on two
sides of an edge, squares of differences would smear it over columns, so a difference well over edge
costs by its logarithm only [Geman and Reynolds 1992, IEEE Trans. Pattern Anal. 14, 367; the
Lorentzian of Black and Rangarajan 1996, Int. J. Comput. Vis. 19, 57].
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.coded_section import CodedSection
from plait.magnetotellurics.linear_solver import BandFactor, sparse
from plait.magnetotellurics.penalty import Quadratic


@dataclass(frozen=True, kw_only=True)
class CodePenalty:
    """Roughness of the section beside the size of its codes and their changes along the line.

    (m - m_ref)^T R (m - m_ref) + code sum_j |v_j|^2 + lateral edge^2 sum_j ln(1 + |d_j|^2/edge^2)

    d_j = v_j+1 - v_j, or for order 2 the change of its slope over the mean distance of neighbours,
    which is v_j+1 - 2 v_j + v_j-1 on columns of one width

    Attributes:
        section: the map.
        roughness: R of the cells, sparse (n_cells, n_cells), with what is wanted of the decoded
            cells in it.
        reference_log10_rho: m_ref, mesh.ground_shape.
        code: weight of the codes' size; the prior's negative logarithm is |v|^2 / 2.
        lateral: weight of the squared difference of neighbour codes, where it is small.
        edge: size of a difference from which on it counts as an edge; infinite for squares alone.
        order: of the differences, 1 or 2.
    """

    section: CodedSection
    roughness: Any
    reference_log10_rho: RealArray
    code: float
    lateral: float
    edge: float = np.inf
    order: int = 1

    @cached_property
    def _step(self) -> Any:
        """Differences of neighbours, sparse (n_codes - order or none, n_codes)."""
        count = self.section.num_codes
        step = np.diff(np.eye(count), axis=0)
        if self.order == 2 and count > 1:
            distance = np.diff(self.section.code_y_m)
            between = (distance[1:] + distance[:-1]) / 2
            step = between[:, None] * np.diff(step / distance[:, None], axis=0)
        return sparse.csr_array(step)

    def value(self, parameters: RealArray) -> float:
        """Give the penalty of a model."""
        codes = self.section.codes(parameters)
        square = self._squares(codes)
        if np.isfinite(self.edge):
            square = self.edge**2 * np.log1p(square / self.edge**2)
        change = self._change(parameters)
        rough = change @ (self.roughness @ change)
        return float(rough + self.code * np.sum(codes**2) + self.lateral * np.sum(square))

    def near(self, parameters: RealArray) -> Quadratic:
        """Give the quadratic with the gradient at this model and Gauss-Newton's curvature.

        An edge has the curvature of the parabola that touches the logarithm from above, 1 / (1 +
        |difference|^2 / edge^2), which keeps the matrix positive (iteratively reweighted squares).
        """
        slope = self.section.slope(parameters)
        of_codes = self._of_codes(self.section.codes(parameters))
        matrix = sparse.csc_array(slope.T @ self.roughness @ slope + of_codes)
        gradient = slope.T @ (self.roughness @ self._change(parameters)) + of_codes @ parameters
        return Quadratic(matrix=matrix, reference=parameters - BandFactor(matrix).solve(gradient))

    def _of_codes(self, codes: RealArray) -> Any:
        weight = 1 / (1 + self._squares(codes) / self.edge**2)
        joined = self._step.T @ sparse.diags_array(weight) @ self._step
        along = self.code * sparse.eye_array(len(codes)) + self.lateral * joined
        num_pixels = len(self.section.pixel_cells)
        return sparse.block_diag(
            [
                sparse.csr_array((num_pixels, num_pixels)),
                sparse.kron(along, sparse.eye_array(codes.shape[1])),
            ],
            format="csr",
        )

    def _change(self, parameters: RealArray) -> RealArray:
        return (self.section.log10_rho(parameters) - self.reference_log10_rho).ravel()

    def _squares(self, codes: RealArray) -> RealArray:
        """Give |d_j|^2 of the differences of neighbours."""
        return np.sum((self._step @ codes) ** 2, axis=1)
