"""Compare an operator, forward and backward, with its formula in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Of the largest value. Float32 sums of some hundred terms lose a few bits of 24. Bfloat16 keeps 8:
# one rounding of each result, one of a sum that is normalized afterwards.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2**-7}


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers that want a gradient."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def check_exact(
    ours: Callable[..., Any], reference: Callable[..., Any], operands: Sequence[Tensor]
) -> None:
    """Results and gradients of ours are the reference's in float64, within the dtype's tolerance.

    Operands that want no gradient are given as they are, but wide.
    """
    found, gradients, tangents = _run(ours, operands, None)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in operands]
    expected, exact, _ = _run(reference, wide, [x.double() for x in tangents])
    for mine, truth in zip((*found, *gradients), (*expected, *exact), strict=True):
        assert mine.dtype == operands[0].dtype
        assert mine.shape == truth.shape
        allowed = TOLERANCES[mine.dtype] * truth.abs().max()
        assert (mine - truth).abs().max() <= allowed


def _run(
    function: Callable[..., Any], operands: Sequence[Tensor], tangents: Sequence[Tensor] | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Sequence[Tensor]]:
    results = function(*operands)
    results = results if isinstance(results, tuple) else (results,)
    if tangents is None:
        tangents = [draw(*x.shape, dtype=x.dtype, seed=1).detach() for x in results]
    with_gradient = [x for x in operands if x.requires_grad]
    return results, torch.autograd.grad(results, with_gradient, tangents), tangents
