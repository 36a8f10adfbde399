"""Cross-entropy of a linear layer's outputs, holding no more than a group of the logits.

The rows are handled in groups; the gradients with respect to the hidden states and the weight are
computed in the forward pass, where the logits of a group are at hand, as in Liger Kernel's fused
loss [Hsu et al. 2024, arXiv:2410.10989, section 3.2]. Where one group holds all rows, each row has
its loss and its gradients apart from the others: then the group is kept, and the gradient of the
weight, a sum over rows, is made of it in the backward.
"""

# Shapes: M rows (tokens), D model width, V vocabulary, m rows of one group.

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from plait.errors import ModelError
from plait.ops.numerics import Numerics, autocast_dtype, without_autocast
from plait.ops.row_exact import multiply_rows
from plait.ops.row_losses import losses_to_gradients
from plait.ops.work import Work, num_bytes

GROUP_ELEMENTS = 32 * 2**20
"""Logits held at a time in the dtype of the products: 64 MiB in bfloat16. Larger groups mean
fewer and larger products; beyond this nothing is gained."""


def linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    dtype: torch.dtype | None = None,
    soft_cap: float | None = None,
    numerics: Numerics = "fast",
) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target] over the rows, float32 scalar [nats].

    The products run in `dtype` (default: that of the enclosing `torch.autocast`, else that of
    `hidden_MD`), the softmax in float32. The weight keeps its own dtype, and so does its gradient.
    Targets below 0 are left out. soft_cap: take cap * tanh(logits / cap) for the logits. numerics:
    "strict" makes each row's share independent of the others, where all logits are one group.
    Raises ModelError for shapes that do not fit.
    """
    _check(hidden_MD, weight_VD, targets_M)
    dtype = dtype or autocast_dtype(hidden_MD.device.type) or hidden_MD.dtype
    switches = (dtype, torch.is_grad_enabled(), soft_cap or 0.0, weight_VD.requires_grad)
    if is_one_group(hidden_MD, weight_VD):
        operator, is_strict = torch.ops.plait.linear_cross_entropy_rows, numerics == "strict"
        losses_M, _, _ = operator(hidden_MD, weight_VD, targets_M, *switches, is_strict)
        return losses_M.sum()
    loss, _, _ = torch.ops.plait.linear_cross_entropy(hidden_MD, weight_VD, targets_M, *switches)
    return loss


def reference_linear_cross_entropy(
    hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor, *, soft_cap: float | None = None
) -> Tensor:
    """Compute the same sum from the whole logits."""
    logits_MV = torch.nn.functional.linear(hidden_MD, weight_VD).float()
    if soft_cap is not None:
        logits_MV = soft_cap * torch.tanh(logits_MV / soft_cap)
    return torch.nn.functional.cross_entropy(
        logits_MV, targets_M, reduction="sum", ignore_index=-100
    )


def linear_cross_entropy_work(hidden_MD: Tensor, weight_VD: Tensor) -> tuple[Work, Work]:
    """Three products forward, as the gradients are made there, or two and one backward.

    Backward the gradients are scaled.
    """
    (rows, width), columns = hidden_MD.shape, weight_VD.shape[0]
    gradients = hidden_MD.numel() + weight_VD.numel()
    moved = num_bytes(hidden_MD, weight_VD)
    product = 2 * rows * width * columns
    waits = int(is_one_group(hidden_MD, weight_VD))
    forward = Work(flops=(3 - waits) * product, bytes=2 * moved)
    return forward, Work(flops=gradients + waits * product, bytes=2 * moved)


def is_one_group(hidden_MD: Tensor, weight_VD: Tensor) -> bool:
    """Whether all logits are held at a time, and kept for the gradient of the weight.

    Of a number of rows that is not known, while a graph is traced for many, they are not.
    """
    num_logits = hidden_MD.shape[0] * weight_VD.shape[0]
    return all(map(statically_known_true, (num_logits > 0, num_logits <= GROUP_ELEMENTS)))


def _check(hidden_MD: Tensor, weight_VD: Tensor, targets_M: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (hidden_MD, weight_VD, targets_M)]
    if (
        [len(shape) for shape in shapes] != [2, 2, 1]
        or shapes[0][1] != shapes[1][1]
        or shapes[0][0] != shapes[2][0]
        or targets_M.dtype != torch.int64
    ):
        raise ModelError(
            "linear_cross_entropy needs hidden states (M, D), a weight (V, D) and int64 targets "
            f"(M,), got {shapes} and {targets_M.dtype}."
        )


@torch.library.custom_op("plait::linear_cross_entropy", mutates_args=())
def _in_groups(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    dtype: torch.dtype,
    with_gradients: bool,
    soft_cap: float = 0.0,
    with_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss and its gradients."""
    weight = weight_VD.to(dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
    with_weight = with_gradients and with_weight
    dhidden_MD, dweight_VD = _empty_gradients(hidden_MD, weight_VD, with_gradients, with_weight)
    num_rows = max(1, GROUP_ELEMENTS // weight.shape[0])
    with without_autocast(hidden_MD.device.type):  # the dtype is given
        for start in range(0, hidden_MD.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            hidden_mD = hidden_MD[rows].to(dtype)
            logits_mV = torch.nn.functional.linear(hidden_mD, weight)
            loss += losses_to_gradients(logits_mV, targets_M[rows], with_gradients, soft_cap).sum()
            if with_gradients:
                dhidden_MD[rows] = logits_mV @ weight
            if with_weight:
                _add_product(dweight_VD, logits_mV.T, hidden_mD, is_first=start == 0)
    return loss, dhidden_MD, dweight_VD


@torch.library.custom_op("plait::linear_cross_entropy_rows", mutates_args=())
def _of_rows(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    dtype: torch.dtype,
    with_gradients: bool,
    soft_cap: float = 0.0,
    with_weight: bool = True,
    is_strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row, float32, and its gradients to the hidden states and the logits.

    The latter are kept only if something asks for the gradient of the weight.
    """
    weight, hidden = weight_VD.to(dtype), hidden_MD.to(dtype)
    multiply = multiply_rows if is_strict else torch.mm
    with without_autocast(hidden_MD.device.type):  # the dtype is given
        logits_MV = multiply(hidden, weight.t())
        losses_M = losses_to_gradients(
            logits_MV, targets_M, with_gradients, soft_cap, is_strict=is_strict
        )
        if not with_gradients:
            return losses_M, hidden_MD.new_empty(0), hidden.new_empty(0)
        dhidden_MD = multiply(logits_MV, weight).to(hidden_MD.dtype)
    return losses_M, dhidden_MD, logits_MV if with_weight else hidden.new_empty(0)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """Add a product to the sum of those before it; the first writes what has no value yet."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0.0 if is_first else 1.0)
    elif is_first:
        total.copy_(left @ right)
    else:
        total += left @ right


@_in_groups.register_fake
def _(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    dtype: torch.dtype,
    with_gradients: bool,
    soft_cap: float = 0.0,
    with_weight: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=hidden_MD.device)
    with_weight = with_gradients and with_weight
    return loss, *_empty_gradients(hidden_MD, weight_VD, with_gradients, with_weight)


@_of_rows.register_fake
def _(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    dtype: torch.dtype,
    with_gradients: bool,
    soft_cap: float = 0.0,
    with_weight: bool = True,
    is_strict: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = hidden_MD.shape[0]
    losses_M = torch.empty(num_rows, dtype=torch.float32, device=hidden_MD.device)
    dhidden = hidden_MD.new_empty(hidden_MD.shape if with_gradients else (0,))
    is_kept = with_gradients and with_weight
    kept = (num_rows, weight_VD.shape[0]) if is_kept else (0,)
    return losses_M, dhidden, hidden_MD.new_empty(kept, dtype=dtype)


def _empty_gradients(
    hidden_MD: Tensor, weight_VD: Tensor, of_hidden: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden_MD) if of_hidden else hidden_MD.new_empty(0),
        torch.empty_like(weight_VD) if of_weight else weight_VD.new_empty(0),
    )


def _save_groups(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.with_weight = inputs[6]
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _through_groups(ctx, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dhidden_MD, dweight_VD = ctx.saved_tensors
    return dhidden_MD * dloss, dweight_VD * dloss if ctx.with_weight else None, *[None] * 5


_in_groups.register_autograd(_through_groups, setup_context=_save_groups)


def _save_rows(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_MD, weight_VD, *_, ctx.with_weight, _is_strict = inputs
    _, dhidden_MD, dlogits_MV = output
    kept = (hidden_MD, dlogits_MV) if ctx.with_weight else (None, None)
    ctx.save_for_backward(dhidden_MD, *kept)
    ctx.dtype = weight_VD.dtype
    ctx.mark_non_differentiable(dhidden_MD, dlogits_MV)
    ctx.set_materialize_grads(False)


def _through_rows(ctx, dlosses_M: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dhidden_MD, hidden_MD, dlogits_MV = ctx.saved_tensors
    scale_M1, dweight_VD = dlosses_M[:, None], None
    if ctx.with_weight:
        scaled_MD = (hidden_MD * scale_M1).to(dlogits_MV.dtype)
        dweight_VD = (dlogits_MV.t() @ scaled_MD).to(ctx.dtype)
    return (dhidden_MD * scale_M1).to(dhidden_MD.dtype), dweight_VD, *[None] * 6


_of_rows.register_autograd(_through_rows, setup_context=_save_rows)
