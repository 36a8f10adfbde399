"""Dense and sparse algebra of inversions: the only file that uses SciPy by name.

Roughness matrices are sparse, and what is divided by them has thousands of columns. In the order of
reverse Cuthill and McKee [George and Liu 1981, section 4.4] such a matrix is a narrow band, which
is a chain of dense blocks, so that all columns are divided by matrix products.
"""

from typing import Any

import numpy as np

from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.optional_module import OptionalModule

_FOR = "magnetotelluric inversion"
dense: Any = OptionalModule("scipy.linalg", needed_for=_FOR)
sparse: Any = OptionalModule("scipy.sparse", needed_for=_FOR)
_graphs: Any = OptionalModule("scipy.sparse.csgraph", needed_for=_FOR)

__all__ = ["BandFactor", "dense", "sparse"]

_SMALLEST_BLOCK = 32  # smaller blocks cost more calls than they save arithmetic


class BandFactor:
    """The Cholesky factor, R = L L^T after reordering, of a sparse positive definite matrix."""

    def __init__(self, matrix: Any) -> None:
        """Factorize; matrix is real symmetric positive definite, (n, n) in any sparse form.

        Raises:
            numpy.linalg.LinAlgError: a matrix that is not positive definite.
        """
        matrix = sparse.csr_array(matrix)
        order = _graphs.reverse_cuthill_mckee(matrix, symmetric_mode=True)
        self._order = np.asarray(order, dtype=np.int64)
        permuted = sparse.coo_array(matrix[self._order][:, self._order])
        reach = int(np.abs(permuted.row - permuted.col).max(initial=0))
        size = max(reach, _SMALLEST_BLOCK)
        starts = range(0, matrix.shape[0], size)
        self._blocks = [slice(start, min(start + size, matrix.shape[0])) for start in starts]
        permuted = sparse.csr_array(permuted)
        # Of each block: the inverse of its own triangle, and what ties it to the block before it.
        self._inverse: list[RealArray] = []
        self._tie: list[RealArray] = []
        for i, block in enumerate(self._blocks):
            own = permuted[block, block].toarray()
            tie = np.zeros((len(own), 0))
            if i:
                between = permuted[block, self._blocks[i - 1]].toarray()
                tie = between @ self._inverse[-1].T
                own -= tie @ tie.T
            triangle = dense.cholesky(own, lower=True)
            self._inverse.append(dense.solve_triangular(triangle, np.eye(len(own)), lower=True))
            self._tie.append(tie)

    def whiten(self, right_hand_sides: RealArray) -> RealArray:
        """Give Y = L^-1 P B for B (n, k), P the reordering, so that Y^T Y = B^T R^-1 B."""
        found = np.array(right_hand_sides[self._order], dtype=float)
        for i, block in enumerate(self._blocks):
            if i:
                found[block] -= self._tie[i] @ found[self._blocks[i - 1]]
            found[block] = self._inverse[i] @ found[block]
        return found

    def solve(self, right_hand_sides: RealArray) -> RealArray:
        """Solve R x = b for b of shape (n,) or (n, k)."""
        found = self.whiten(right_hand_sides)
        for i in reversed(range(len(self._blocks))):
            block = self._blocks[i]
            if i + 1 < len(self._blocks):
                found[block] -= self._tie[i + 1].T @ found[self._blocks[i + 1]]
            found[block] = self._inverse[i].T @ found[block]
        solution = np.empty_like(found)
        solution[self._order] = found
        return solution
