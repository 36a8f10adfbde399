"""Dense and sparse algebra of inversions: the only file that uses SciPy by name."""

from typing import Any

from plait.magnetotellurics.optional_module import OptionalModule

_FOR = "magnetotelluric inversion"
dense: Any = OptionalModule("scipy.linalg", needed_for=_FOR)
sparse: Any = OptionalModule("scipy.sparse", needed_for=_FOR)
_sparse_linalg: Any = OptionalModule("scipy.sparse.linalg", needed_for=_FOR)

__all__ = ["dense", "factorize_real", "sparse"]


def factorize_real(matrix: Any) -> Any:
    """Factorize a real sparse symmetric positive definite matrix; the result has solve(b)."""
    return _sparse_linalg.splu(
        sparse.csc_array(matrix),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )
