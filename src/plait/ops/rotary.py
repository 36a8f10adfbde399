"""Rotary position embedding of queries or keys, in the half-split layout [Su et al. 2021].

Heads stand beside each other in memory for each token, as projections make them; one kernel turns
all of them, and its backward is the same kernel with the transposed rotation.
"""

# Shapes: B batch, T tokens, N heads, H head size, R the part of it that is turned, M = B * T.

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.ops.fused_kernel import FusedKernel
from plait.ops.work import Work, pointwise_work, wide


def rotary(x_BNTH: Tensor, cos_B1TR: Tensor, sin_B1TR: Tensor) -> Tensor:
    """Turn each pair (i, i + R/2) by its angle, leave the rest: (B, N, T, H) in the input's dtype.

    Tables as `nn.rotary.rotation_tables` makes them, of batch B or 1; they get no gradient. Input
    and result are views of (B, T, N, H); another layout is copied to that first. Computed in
    float32 (float64 for float64), rounded once.
    """
    _check(x_BNTH, cos_B1TR, sin_B1TR)
    batch, num_heads, num_tokens, head_size = x_BNTH.shape
    x_MNH = x_BNTH.transpose(1, 2).reshape(-1, num_heads, head_size)

    def rows(table_B1TR: Tensor) -> Tensor:
        table_BTR = table_B1TR[:, 0].expand(batch, -1, -1)
        return table_BTR.reshape(-1, table_BTR.shape[-1])

    turned_MNH = torch.ops.plait.rotary(x_MNH, rows(cos_B1TR), rows(sin_B1TR))
    return turned_MNH.view(batch, num_tokens, num_heads, head_size).transpose(1, 2)


def reference_rotary(x_BNTH: Tensor, cos_B1TR: Tensor, sin_B1TR: Tensor) -> Tensor:
    """The formula in the dtype of its operands."""
    size = cos_B1TR.shape[-1]
    first, second = x_BNTH[..., :size].chunk(2, dim=-1)
    turned = x_BNTH[..., :size] * cos_B1TR + torch.cat((-second, first), dim=-1) * sin_B1TR
    return torch.cat((turned, x_BNTH[..., size:]), dim=-1)


def rotary_work(x_BNTH: Tensor, cos_B1TR: Tensor) -> tuple[Work, Work]:
    """Forward and backward do the same."""
    work = pointwise_work(3, x_BNTH, x_BNTH, x_BNTH, cos_B1TR, cos_B1TR)
    return work, work


def _check(x_BNTH: Tensor, cos_B1TR: Tensor, sin_B1TR: Tensor) -> None:
    shape, table = tuple(x_BNTH.shape), tuple(cos_B1TR.shape)
    fits = (
        len(shape) == len(table) == 4
        and table[0] in (1, shape[0])
        and table[1:3] == (1, shape[2])
        and 0 < table[3] <= shape[3]
        and table[3] % 2 == 0
        and table == tuple(sin_B1TR.shape)
    )
    if not fits or not x_BNTH.dtype.is_floating_point:
        raise ModelError(
            f"rotary of floating-point (B, N, T, H)={shape} needs two tables (B or 1, 1, T, R), "
            f"R even and at most H, got {table} and {tuple(sin_B1TR.shape)}."
        )
    if cos_B1TR.requires_grad or sin_B1TR.requires_grad:
        raise ModelError("rotary computes no gradient of its tables: detach them.")


def _turn(x_MNH: Tensor, cos_MR: Tensor, sin_MR: Tensor) -> tuple[Tensor]:
    size = cos_MR.shape[-1]
    first, second = wide(x_MNH[..., :size]).chunk(2, dim=-1)
    cos_1, cos_2 = wide(cos_MR)[:, None].chunk(2, dim=-1)
    sin_1, sin_2 = wide(sin_MR)[:, None].chunk(2, dim=-1)
    turned = (first * cos_1 - second * sin_1, second * cos_2 + first * sin_2)
    parts = [part.to(x_MNH.dtype) for part in turned]
    return (torch.cat((*parts, x_MNH[..., size:]) if size < x_MNH.shape[-1] else parts, dim=-1),)


_turn_kernel = FusedKernel(_turn)


@torch.library.custom_op("plait::rotary", mutates_args=())
def _rotary(x_MNH: Tensor, cos_MR: Tensor, sin_MR: Tensor) -> Tensor:
    return _turn_kernel(x_MNH, cos_MR, sin_MR)[0]


@_rotary.register_fake
def _(x_MNH: Tensor, cos_MR: Tensor, sin_MR: Tensor) -> Tensor:
    return x_MNH.new_empty(x_MNH.shape)


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, dturned_MNH: Tensor) -> tuple[Tensor, None, None]:
    cos_MR, sin_MR = ctx.saved_tensors
    # Of each pair, the transposed matrix; the two halves of a table need not be equal.
    back_MR = -sin_MR.roll(sin_MR.shape[-1] // 2, dims=-1)
    return torch.ops.plait.rotary(dturned_MNH, cos_MR, back_MR), None, None


_rotary.register_autograd(_backward, setup_context=_save)
