"""One step of Muon over many matrices: momentum, orthogonalized, then subtracted.

Two things make it faster than the iteration written out. Products run in bfloat16 only where the
hardware multiplies it, else in float32. And for a matrix that is longer than wide the iteration
X <- p(X X^T) X is carried out on the small square X X^T alone, as all its polynomials commute.
"""

# Shapes: matrices of r rows and c columns, r <= c after a transposition; Gram matrices r by r.

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.ops.numerics import product_dtype
from plait.ops.work import Work, num_bytes

_aten = torch.ops.aten

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic [Jordan et al. 2024, kellerjordan.github.io/posts/muon]: steepest at zero."""
_NUM_ITERATIONS = 5
_GRAM_RATIO = 1.5
"""Columns over rows from which the Gram matrix saves products: 34 r^3 + 4 r^2 c of them against
10 r^3 + 20 r^2 c."""


@dataclass(frozen=True, kw_only=True)
class MuonSettings:
    """Of one step.

    match_adamw: scale updates to the size of AdamW's, 0.2 sqrt(max(r, c)) [Liu et al. 2025,
    arXiv:2502.16982, eq. 4], else sqrt(max(1, rows / columns)). dtype: of the products; None = what
    is fastest here.
    """

    learning_rate: float
    momentum: float = 0.95
    weight_decay: float = 0.1
    is_nesterov: bool = True
    match_adamw: bool = False
    dtype: torch.dtype | None = None


def muon_step_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    settings: MuonSettings,
) -> None:
    """Update matrices and momenta in place [Jordan et al. 2024].

    Raises ModelError for what is no matrix, or no momentum or gradient of its shape.
    """
    _check(parameters, gradients, momenta)
    if not parameters:
        return
    with torch.no_grad():
        _aten._foreach_lerp_.Scalar(list(momenta), list(gradients), 1 - settings.momentum)
        updates = list(momenta)
        if settings.is_nesterov:
            updates = _aten._foreach_lerp.Scalar(list(gradients), list(momenta), settings.momentum)
        _aten._foreach_mul_.Scalar(
            list(parameters), 1 - settings.learning_rate * settings.weight_decay
        )
        for parameter, update in zip(parameters, updates, strict=True):
            rate = settings.learning_rate * _size(parameter.shape, settings.match_adamw)
            direction = torch.ops.plait.orthogonalize(update, _dtype(update, settings.dtype))
            parameter.sub_(direction, alpha=rate)


def orthogonalize(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Bring a matrix's singular values near 1 (0.7 to 1.2), in `dtype` (None = the fastest)."""
    _check((x,))
    return torch.ops.plait.orthogonalize(x, _dtype(x, dtype)).to(x.dtype)


def reference_orthogonalize(x: Tensor) -> Tensor:
    """The iteration written out, in the dtype of x."""
    a, b, c = _COEFFICIENTS
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon_work(parameters: Sequence[Tensor]) -> Work:
    """The products of the cheaper form, and four tensors read, two written."""
    flops = sum(orthogonalize_flops(*parameter.shape) for parameter in parameters)
    return Work(flops=flops, bytes=6 * num_bytes(*parameters))


def orthogonalize_flops(rows: int, columns: int) -> int:
    """Of the form that has fewer products."""
    r, c = sorted((rows, columns))
    squares, longs = (34, 4) if c >= _GRAM_RATIO * r else (10, 20)
    return squares * r**3 + longs * r**2 * c


def _check(parameters: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    lengths = [len(parameters), *(len(tensors) for tensors in others)]
    if len(set(lengths)) > 1:
        raise ModelError(f"muon_step_ needs lists of one length, got {lengths}.")
    for i, tensors in enumerate(zip(parameters, *others, strict=True)):
        shapes = [tuple(t.shape) for t in tensors]
        is_matrix = len(shapes[0]) == 2 and tensors[0].dtype.is_floating_point
        if len(set(shapes)) > 1 or not is_matrix:
            raise ModelError(
                "Muon takes floating-point matrices, with gradients and momenta of their shapes; "
                f"number {i} has {shapes} and {tensors[0].dtype}."
            )


def _size(shape: Sequence[int], match_adamw: bool) -> float:
    rows, columns = shape
    if match_adamw:
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def _dtype(x: Tensor, asked: torch.dtype | None) -> torch.dtype:
    if asked is not None or x.dtype == torch.float64:
        return asked or x.dtype
    return product_dtype(torch.bfloat16, x.device)


@torch.library.custom_op("plait::orthogonalize", mutates_args=())
def _orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """In the dtype of the products: what it is subtracted from has its own."""
    is_tall = x.shape[0] > x.shape[1]
    x_rc = (x.mT if is_tall else x).to(dtype, copy=True)
    x_rc.div_(x_rc.norm().clamp(min=1e-7))
    # In bfloat16 the small eigenvalues of a Gram matrix are lost in its rounding.
    if dtype != torch.bfloat16 and x_rc.shape[1] >= _GRAM_RATIO * x_rc.shape[0]:
        x_rc = _factor(x_rc @ x_rc.mT) @ x_rc
    else:
        for _ in range(_NUM_ITERATIONS):
            x_rc = torch.addmm(x_rc, _polynomial(x_rc @ x_rc.mT), x_rc, beta=_COEFFICIENTS[0])
    return (x_rc.mT if is_tall else x_rc).contiguous()


@_orthogonalize.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _polynomial(gram_rr: Tensor) -> Tensor:
    """B G + c G G."""
    _, b, c = _COEFFICIENTS
    return torch.addmm(gram_rr, gram_rr, gram_rr, beta=b, alpha=c)


def _factor(gram_rr: Tensor) -> Tensor:
    """The product of all iterations' polynomials: what takes X to its result."""
    total_rr = None
    for i in range(_NUM_ITERATIONS):
        step_rr = _polynomial(gram_rr)
        step_rr.diagonal().add_(_COEFFICIENTS[0])
        total_rr = step_rr if total_rr is None else step_rr @ total_rr
        if i + 1 < _NUM_ITERATIONS:
            gram_rr = step_rr @ (gram_rr @ step_rr)
    assert total_rr is not None
    return total_rr
