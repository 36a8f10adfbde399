"""A linear layer in strict numerics: output and input gradient of a row depend on that row alone.

The weight gradient is one product over all rows, the same bits for the same rows.
"""

# Shapes: M rows (tokens), K inputs, N outputs, X matrices side by side.

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.ops.numerics import autocast_inputs, check_alike
from plait.ops.row_exact import multiply_rows


def strict_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """Compute x @ weight.T + bias over the last dim of x, (..., N).

    Raises ModelError for shapes, dtypes or devices that do not fit together.
    """
    if bias_N is None:
        x, weight_NK = autocast_inputs(x, weight_NK)
        check_alike("strict_linear", x, weight_NK)
    else:
        x, weight_NK, bias_N = autocast_inputs(x, weight_NK, bias_N)
        check_alike("strict_linear", x, weight_NK, bias_N)
    _check_shapes(x, weight_NK, bias_N)
    y_MN = torch.ops.plait.strict_linear(x.reshape(-1, x.shape[-1]), weight_NK)
    y = y_MN.view(*x.shape[:-1], weight_NK.shape[0])
    return y if bias_N is None else y + bias_N


def _check_shapes(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> None:
    if weight_NK.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight_NK.shape[1]:
        raise ModelError(
            f"strict_linear cannot multiply {tuple(x.shape)} by the transpose of "
            f"{tuple(weight_NK.shape)}: the last dims must be equal, and the weight has two."
        )
    if bias_N is not None and bias_N.shape != weight_NK.shape[:1]:
        raise ModelError(
            f"strict_linear got a bias of shape {tuple(bias_N.shape)} for a weight of shape "
            f"{tuple(weight_NK.shape)}. It must have {weight_NK.shape[0]} elements."
        )


@torch.library.custom_op("plait::strict_linear", mutates_args=())
def _strict_linear(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    with torch.autocast(x_MK.device.type, enabled=False):
        return multiply_rows(x_MK, weight_NK.t())


@_strict_linear.register_fake
def _(x_MK: Tensor, weight_NK: Tensor) -> Tensor:
    return x_MK.new_empty(x_MK.shape[0], weight_NK.shape[0])


def _save(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy_MN: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x_MK, weight_NK = ctx.saved_tensors
    needs_dx, needs_dweight = ctx.needs_input_grad
    dx_MK = torch.ops.plait.strict_linear(dy_MN, weight_NK.t()) if needs_dx else None
    return dx_MK, dy_MN.t() @ x_MK if needs_dweight else None


_strict_linear.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("plait::strict_batched_linear", mutates_args=())
def strict_batched_linear(x_XMK: Tensor, weight_XNK: Tensor) -> Tensor:
    """Multiply X matrices of rows, each by the transpose of its own weight: (X, M, N)."""
    with torch.autocast(x_XMK.device.type, enabled=False):
        y_XMN = x_XMK.new_empty(*x_XMK.shape[:2], weight_XNK.shape[1])
        for x_MK, weight_NK, y_MN in zip(x_XMK, weight_XNK, y_XMN, strict=True):
            y_MN.copy_(multiply_rows(x_MK, weight_NK.t()))
        return y_XMN


@strict_batched_linear.register_fake
def _(x_XMK: Tensor, weight_XNK: Tensor) -> Tensor:
    return x_XMK.new_empty(*x_XMK.shape[:2], weight_XNK.shape[1])
