"""Kernels for GPUs, in Triton, where those that TorchInductor writes go over memory too often.

Imported only where Triton is installed (`fused_kernel.triton_kernels`). Pointwise operators have
none here: on a GPU Inductor writes them in Triton already. Triton's interpreter runs these on a
CPU, which is how they are tested.
"""

# pyright: basic
# (Triton is optional and not typed.)

# Shapes: M rows, D width, V vocabulary, P programs.

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_MAX_WIDTH = 2**16  # elements of a row that one program holds at once
_MAX_ELEMENTS = 2**31 - 1  # offsets are 32 bits wide
_BLOCK_COLUMNS = 4096


def takes_norm(total_MD: Tensor) -> bool:
    """Whether `norm_gradients` can handle rows of that width, and that many of them."""
    return total_MD.shape[1] <= _MAX_WIDTH and total_MD.numel() <= _MAX_ELEMENTS


def norm_gradients(
    dnormed_MD: Tensor,
    dsum_MD: Tensor | None,
    total_MD: Tensor,
    scale_M: Tensor,
    weight_D: Tensor,
    offset: float,
    *,
    num_programs: int,
) -> tuple[Tensor, Tensor]:
    """What `rms_norm._gradients` computes, in one pass over the rows; operands are contiguous."""
    num_rows, width = total_MD.shape
    dtotal_MD = torch.empty_like(total_MD)
    sums_PD = scale_M.new_empty(num_programs, width)
    if _has_values(total_MD):
        _norm_gradients[(num_programs,)](  # pyright: ignore[reportIndexIssue]
            dnormed_MD,
            total_MD if dsum_MD is None else dsum_MD,
            total_MD,
            scale_M,
            weight_D,
            dtotal_MD,
            sums_PD,
            num_rows,
            width,
            offset,
            HAS_SUM=dsum_MD is not None,
            BLOCK=triton.next_power_of_2(width),
        )
    return dtotal_MD, sums_PD.sum(0).to(weight_D.dtype)


def losses_to_gradients(
    logits_MV: Tensor, targets_M: Tensor, with_gradients: bool, soft_cap: float
) -> Tensor:
    """What `row_losses.losses_to_gradients` does: logits are read twice, written once.

    Returns each row's loss; with gradients, the logits are overwritten by theirs.
    """
    losses_M = torch.empty(logits_MV.shape[0], dtype=torch.float32, device=logits_MV.device)
    if _has_values(logits_MV):
        _losses[(logits_MV.shape[0],)](  # pyright: ignore[reportIndexIssue]
            logits_MV,
            targets_M,
            losses_M,
            logits_MV.shape[1],
            soft_cap or 1.0,
            HAS_CAP=soft_cap != 0,
            WITH_GRADIENTS=with_gradients,
            BLOCK=min(_BLOCK_COLUMNS, triton.next_power_of_2(logits_MV.shape[1])),
        )
    return losses_M


def _has_values(x: Tensor) -> bool:
    """Not a fake one, on which the dry run looks only at what is allocated."""
    return not isinstance(x, FakeTensor)


@triton.jit
def _norm_gradients(
    dnormed,
    dsum,
    total,
    scale,
    weight,
    dtotal,
    sums,
    num_rows,
    width,
    offset,
    HAS_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = offset + tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    sum_of_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, num_rows, tl.num_programs(0)):
        at = row * width + columns
        gradient = tl.load(dnormed + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
        row_scale = tl.load(scale + row)
        product = gradient * x * row_scale
        sum_of_weight += product
        mean = tl.sum(product * factor) / width * row_scale
        result = (gradient * factor - x * mean) * row_scale
        if HAS_SUM:
            result += tl.load(dsum + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dtotal + at, result.to(dtotal.dtype.element_ty), mask=inside)
    tl.store(sums + program * width + columns, sum_of_weight, mask=inside)


@triton.jit
def _capped(x, cap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        return cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)  # cap tanh(x / cap)
    return x


@triton.jit
def _losses(
    logits,
    targets,
    losses,
    vocabulary,
    cap,
    HAS_CAP: tl.constexpr,
    WITH_GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    target = tl.load(targets + row)
    is_counted = target >= 0
    # The largest logit and the sum of exponentials, together [Milakov & Gimelshein 2018,
    # arXiv:1805.02867, algorithm 3].
    base = logits + row.to(tl.int64) * vocabulary
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(base + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        x = tl.where(columns < vocabulary, _capped(x, cap, HAS_CAP), float("-inf"))
        new_largest = tl.maximum(largest, tl.max(x))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest))
        largest = new_largest
    at_target = tl.load(base + tl.maximum(target, 0)).to(tl.float32)
    loss = largest + tl.log(total) - _capped(at_target, cap, HAS_CAP)
    tl.store(losses + row, tl.where(is_counted, loss, 0.0))
    if WITH_GRADIENTS:
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            x = _capped(
                tl.load(base + columns, mask=inside, other=0.0).to(tl.float32), cap, HAS_CAP
            )
            gradient = tl.exp(x - largest) / total - (columns == target).to(tl.float32)
            if HAS_CAP:
                gradient *= 1.0 - (x / cap) * (x / cap)
            gradient = tl.where(is_counted, gradient, 0.0)
            tl.store(base + columns, gradient.to(logits.dtype.element_ty), mask=inside)
