"""SiLU in strict numerics.

PyTorch's kernel takes another exponential for the few elements that do not fill a vector, so that a
value depends on where it lies. `torch.exp` does not; the rest is exactly rounded arithmetic.
"""

import torch
from torch import Tensor

from plait.ops.numerics import check_alike

_BLOCK_ELEMENTS = 2**17
"""Elements handled at a time: 512 KiB of float32, which stays in the second-level cache."""


def strict_silu(x: Tensor) -> Tensor:
    """Compute x / (1 + exp(-x)), in float32 inside, in the dtype of x outside."""
    check_alike("strict_silu", x)
    return torch.ops.plait.strict_silu(x)


@torch.library.custom_op("plait::strict_silu", mutates_args=())
def _strict_silu(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    for x_block, y_block in zip(*(_blocks(t) for t in (x, y)), strict=True):
        value = x_block.to(_wide(x))
        y_block.copy_(value / value.neg().exp_().add_(1.0))
    return y


@_strict_silu.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("plait::strict_silu_backward", mutates_args=())
def _strict_silu_backward(dy: Tensor, x: Tensor) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    for dy_block, x_block, dx_block in zip(*(_blocks(t) for t in (dy, x, dx)), strict=True):
        value = x_block.to(_wide(x))
        sigmoid = value.neg().exp_().add_(1.0).reciprocal_()
        # d/dx x s(x) = s (1 + x (1 - s))
        slope = (1.0 - sigmoid).mul_(value).add_(1.0).mul_(sigmoid)
        dx_block.copy_(slope.mul_(dy_block))
    return dx


@_strict_silu_backward.register_fake
def _(dy: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy: Tensor) -> Tensor:
    return torch.ops.plait.strict_silu_backward(dy, *ctx.saved_tensors)


_strict_silu.register_autograd(_backward, setup_context=_save)


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return x.view(-1).split(_BLOCK_ELEMENTS)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
