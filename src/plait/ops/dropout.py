"""Dropout whose mask is a function of (seed, stream, index of the element), and of nothing else.

The mask is never stored: the backward draws it again. It is the same on every kind of device, in
any number of threads, and, with `start`, for any part of a tensor.
"""

# Shapes: M rows, W width.

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.ops.fused_kernel import FusedKernel
from plait.ops.work import Work, pointwise_work

_MASK_64 = 2**64 - 1


def dropout(x: Tensor, p: float, *, seed: int, stream: int = 0, start: int = 0) -> Tensor:
    """Set elements to zero with probability p, divide the rest by 1 - p: contiguous.

    stream: which of a seed's masks, say the number of the step and layer. start: index of the
    first element, where x is a part of a larger tensor. p is rounded to a multiple of 2^-32.
    """
    if not 0 <= p < 1 or not x.dtype.is_floating_point:
        raise ModelError(f"dropout needs floating-point numbers and 0 <= p < 1, got {p}, {x.dtype}")
    if start < 0 or start + x.numel() >= 2**63:
        raise ModelError(f"dropout needs an index of 0 to 2^63 - 1, got start={start}.")
    state_2 = torch.tensor([_signed(_key(seed, stream)), start], device=x.device)
    rows = x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
    return torch.ops.plait.dropout(rows, state_2, p).view(x.shape)


def reference_dropout(x: Tensor, p: float, *, seed: int, stream: int = 0, start: int = 0) -> Tensor:
    """The same in Python's integers, element by element."""
    key = _key(seed, stream)
    draws = [_squares(start + i, key) for i in range(x.numel())]
    kept = torch.tensor([draw >= round(p * 2**32) for draw in draws], device=x.device)
    return x * kept.view(x.shape) / (1 - p)


def dropout_work(x: Tensor) -> tuple[Work, Work]:
    """Forward and backward do the same; the draws are not counted."""
    work = pointwise_work(2, x, x, x)
    return work, work


def _key(seed: int, stream: int) -> int:
    """64 irregular bits, odd: two rounds of SplitMix64 [Steele et al. 2014, figure 16]."""
    key = 0
    for word in (seed, stream):
        key = (key ^ word) + 0x9E3779B97F4A7C15 & _MASK_64
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
        key = (key ^ key >> 27) * 0x94D049BB133111EB & _MASK_64
        key ^= key >> 31
    return key | 1


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _squares(counter: int, key: int) -> int:
    """32 random bits: four rounds of middle squares [Widynski 2020, arXiv:2004.06278, figure 1]."""
    x = y = counter * key & _MASK_64
    z = y + key & _MASK_64
    for addend in (y, z, y):
        x = x * x + addend & _MASK_64
        x = (x >> 32 | x << 32) & _MASK_64
    return (x * x + z & _MASK_64) >> 32


def _drop(x_MW: Tensor, state_2: Tensor, *, p: float) -> tuple[Tensor]:
    num_rows, width = x_MW.shape
    key, start = state_2[0], state_2[1]
    # int64 wraps around as the 64 bits without sign of the paper do.
    rows_M1 = torch.arange(num_rows, device=x_MW.device)[:, None] * width
    x = y = (rows_M1 + torch.arange(width, device=x_MW.device) + start) * key
    z = y + key
    for addend in (y, z, y):
        x = x * x + addend
        x = (x >> 32) & 0xFFFFFFFF | x << 32
    draws = (x * x + z >> 32) & 0xFFFFFFFF
    kept = draws >= round(p * 2**32)
    return (torch.where(kept, x_MW * (1 / (1 - p)), 0.0),)


_drop_kernel = FusedKernel(_drop)


@torch.library.custom_op("plait::dropout", mutates_args=())
def _dropout(x_MW: Tensor, state_2: Tensor, p: float) -> Tensor:
    return _drop_kernel(x_MW, state_2, p=p)[0]


@_dropout.register_fake
def _(x_MW: Tensor, state_2: Tensor, p: float) -> Tensor:
    return x_MW.new_empty(x_MW.shape)


def _save(ctx, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, state_2, ctx.p = inputs
    ctx.save_for_backward(state_2)


def _backward(ctx, dout_MW: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.plait.dropout(dout_MW, *ctx.saved_tensors, ctx.p), None, None


_dropout.register_autograd(_backward, setup_context=_save)
