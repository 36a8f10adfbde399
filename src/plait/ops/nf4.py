"""Four-bit normal floats: 16 values that a normal distribution visits equally often.

[Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3 and appendix E.] Blocks of 64 weights
share a scale; scales are held in 8 bits, 256 to a step ("double quantization"): 4.127 bits each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 64
SCALE_BLOCK = 256
# Appendix E of the paper.
_VALUES = tuple(
    float(value)
    for value in [
        "-1.0",
        "-0.6961928009986877",
        "-0.5250730514526367",
        "-0.39491748809814453",
        "-0.28444138169288635",
        "-0.18477343022823334",
        "-0.09105003625154495",
        "0.0",
        "0.07958029955625534",
        "0.16093020141124725",
        "0.24611230194568634",
        "0.33791524171829224",
        "0.44070982933044434",
        "0.5626170039176941",
        "0.7229568362236023",
        "1.0",
    ]
)


@dataclass(frozen=True)
class Nf4:
    """A quantized matrix.

    packed: uint8, two codes a byte, the even element in the high half. scales: int8, one a block of
    64. steps: float32, one a block of 256 scales; mean: float32 scalar added to all scales.
    """

    packed: Tensor
    scales: Tensor
    steps: Tensor
    mean: Tensor


def quantize_nf4(weight: Tensor) -> Nf4:
    """Quantize a tensor of any shape; the last block is filled up with zeros."""
    flat = weight.detach().float().flatten()
    blocks = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    mean = largest.mean()
    centred = functional.pad(largest - mean, (0, -len(largest) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    steps = centred.abs().amax(dim=1).clamp(min=1e-12) / 127
    scales = (centred / steps[:, None]).round().to(torch.int8).flatten()[: len(largest)]
    # The codes are chosen for the scales that will be read back.
    decoded = _decode_scales(scales, steps, mean)
    values = torch.tensor(_VALUES, device=weight.device)
    limits = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / decoded.clamp(min=1e-12)[:, None], limits).to(torch.uint8)
    return Nf4(codes[:, ::2].flatten() << 4 | codes[:, 1::2].flatten(), scales, steps, mean)


def dequantize_nf4(matrix: Nf4, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Undo `quantize_nf4` up to its rounding."""
    values = torch.tensor(_VALUES, device=matrix.packed.device)
    codes = torch.stack((matrix.packed >> 4, matrix.packed & 15), dim=-1).flatten()
    blocks = values[codes.int()].view(-1, BLOCK)
    blocks = blocks * _decode_scales(matrix.scales, matrix.steps, matrix.mean)[:, None]
    return blocks.flatten()[: shape.numel()].view(shape).to(dtype)


def nf4_linear(x: Tensor, matrix: Nf4, out_size: int, bias: Tensor | None) -> Tensor:
    """Map (..., I) to (..., O) by a quantized matrix (O, I), keeping nothing larger."""
    return _Linear.apply(x, matrix.packed, matrix.scales, matrix.steps, matrix.mean, out_size, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, scales, steps, mean, out_size, bias):
        ctx.save_for_backward(packed, scales, steps, mean)
        ctx.shape = torch.Size((out_size, x.shape[-1]))
        matrix = Nf4(packed, scales, steps, mean)
        return functional.linear(x, dequantize_nf4(matrix, ctx.shape, x.dtype), bias)

    @staticmethod
    def backward(ctx, *douts):
        (dout,) = douts
        weight = dequantize_nf4(Nf4(*ctx.saved_tensors), ctx.shape, dout.dtype)
        return dout @ weight, None, None, None, None, None, None


def _decode_scales(scales: Tensor, steps: Tensor, mean: Tensor) -> Tensor:
    return scales.float() * steps.repeat_interleave(SCALE_BLOCK)[: len(scales)] + mean
