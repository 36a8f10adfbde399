"""Sparse complex symmetric solves: the only file that uses SciPy by name.

SuperLU needs an ordering that keeps its factors small. On our rectangles of nodes nested dissection
is simple to state and fills less than minimum degree, so the order is made here once for a mesh.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.magnetotellurics.arrays import AnyArray, IndexArray
from plait.magnetotellurics.optional_module import OptionalModule

_FOR = "2-D magnetotelluric modelling"
dense: Any = OptionalModule("scipy.linalg", needed_for=_FOR)
sparse: Any = OptionalModule("scipy.sparse", needed_for=_FOR)
_sparse_linalg: Any = OptionalModule("scipy.sparse.linalg", needed_for=_FOR)

__all__ = ["Factor", "dense", "dissection_order", "factorize", "factorize_real", "sparse"]


@dataclass(frozen=True, kw_only=True)
class Factor:
    """An LU factorization of a permuted symmetric matrix."""

    lu: Any
    order: IndexArray

    def solve(self, right_hand_sides: AnyArray) -> AnyArray:
        """Solve A x = b for b of shape (n,) or (n, k); A is symmetric, so this serves A^T too."""
        solution = np.empty(right_hand_sides.shape, dtype=np.complex128)
        solution[self.order] = self.lu.solve(
            np.ascontiguousarray(right_hand_sides[self.order], dtype=np.complex128)
        )
        return solution


def factorize(matrix: Any, order: IndexArray) -> Factor:
    """Factorize a complex symmetric sparse matrix, rows and columns taken in this order."""
    permuted = sparse.csc_array(matrix.tocsr()[order][:, order])
    # The matrices are diagonally strong (stiffness plus i times mass), so that pivoting off the
    # diagonal is not needed and would destroy the order.
    lu = _sparse_linalg.splu(
        permuted,
        permc_spec="NATURAL",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True, "Equil": False},
    )
    return Factor(lu=lu, order=order)


def factorize_real(matrix: Any) -> Any:
    """Factorize a real sparse symmetric positive definite matrix; the result has solve(b)."""
    return _sparse_linalg.splu(
        sparse.csc_array(matrix),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )


def dissection_order(num_rows: int, num_columns: int, *, leaf: int = 12) -> IndexArray:
    """Give a nested dissection of a rectangle of nodes, numbered row by row [George 1973]."""
    index = np.arange(num_rows * num_columns).reshape(num_rows, num_columns)
    parts: list[AnyArray] = []
    _dissect(index, leaf, parts)
    return np.concatenate(parts)


def _dissect(block: AnyArray, leaf: int, parts: list[AnyArray]) -> None:
    rows, columns = block.shape
    if rows * columns <= leaf * leaf or min(rows, columns) < 3:
        # Along the longer side, so that the leaf is a thin band.
        parts.append(block.ravel() if rows > columns else block.T.ravel())
        return
    if columns >= rows:
        middle = columns // 2
        _dissect(block[:, :middle], leaf, parts)
        _dissect(block[:, middle + 1 :], leaf, parts)
        parts.append(block[:, middle])
    else:
        middle = rows // 2
        _dissect(block[:middle], leaf, parts)
        _dissect(block[middle + 1 :], leaf, parts)
        parts.append(block[middle])
