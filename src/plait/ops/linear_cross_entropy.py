"""Cross-entropy of a linear layer's outputs, holding no more than a group of the logits.

The rows are handled in groups; the gradients with respect to the hidden states and the weight are
computed in the forward pass, where the logits of a group are at hand, as in Liger Kernel's fused
loss [Hsu et al. 2024, arXiv:2410.10989, section 3.2]. Where one group holds all rows and is smaller
than the gradient of the weight, that product waits for the backward, and the group is kept for it.
"""

# Shapes: M rows (tokens), D model width, V vocabulary, m rows of one group.

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from plait.errors import ModelError
from plait.ops.fused_kernel import triton_kernels
from plait.ops.numerics import autocast_dtype, without_autocast
from plait.ops.work import Work, num_bytes

GROUP_ELEMENTS = 32 * 2**20
"""Logits held at a time in the dtype of the products: 64 MiB in bfloat16. Larger groups mean
fewer and larger products; beyond this nothing is gained."""
_BLOCK_ELEMENTS = 2**20
"""Logits whose softmax is taken at a time: 4 MiB in float32, so that they stay in cache."""


def linear_cross_entropy(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    *,
    dtype: torch.dtype | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target] over the rows, float32 scalar [nats].

    The products run in `dtype` (default: that of the enclosing `torch.autocast`, else that of
    `hidden_MD`), the softmax in float32. The weight keeps its own dtype, and so does its gradient.
    Targets below 0 are left out. soft_cap: take cap * tanh(logits / cap) for the logits. Raises
    ModelError for shapes that do not fit.
    """
    _check(hidden_MD, weight_VD, targets_M)
    dtype = dtype or autocast_dtype(hidden_MD.device.type) or hidden_MD.dtype
    with_gradients, with_weight = torch.is_grad_enabled(), weight_VD.requires_grad
    waits = with_gradients and with_weight and pays_to_wait(hidden_MD, weight_VD, dtype)
    switches = (dtype, with_gradients, soft_cap or 0.0, with_weight, waits)
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
    waits = int(pays_to_wait(hidden_MD, weight_VD, hidden_MD.dtype))
    forward = Work(flops=(3 - waits) * product, bytes=2 * moved)
    return forward, Work(flops=gradients + waits * product, bytes=2 * moved)


def pays_to_wait(hidden_MD: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> bool:
    """Whether all logits are one group, smaller than the gradient of the weight.

    Then the group is kept, and that gradient is made in the backward.
    """
    num_logits = hidden_MD.shape[0] * weight_VD.shape[0]
    smaller = num_logits * dtype.itemsize < weight_VD.numel() * weight_VD.element_size()
    # A number of rows that is not known, while a graph is traced for many, pays for none.
    return all(map(statically_known_true, (num_logits > 0, num_logits <= GROUP_ELEMENTS, smaller)))


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
def _forward(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    dtype: torch.dtype,
    with_gradients: bool,
    soft_cap: float = 0.0,
    with_weight: bool = True,
    weight_waits: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the gradient of the hidden states, and what the weight's is made of."""
    weight = weight_VD.to(dtype)
    loss = torch.zeros((), dtype=torch.float32, device=hidden_MD.device)
    sums = with_gradients and with_weight and not weight_waits
    dhidden_MD, kept = _empty_gradients(hidden_MD, weight_VD, with_gradients, sums)
    num_rows = hidden_MD.shape[0] if weight_waits else max(1, GROUP_ELEMENTS // weight.shape[0])
    with without_autocast(hidden_MD.device.type):  # the dtype is given
        for start in range(0, hidden_MD.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            hidden_mD = hidden_MD[rows].to(dtype)
            logits_mV = torch.nn.functional.linear(hidden_mD, weight)
            loss += _losses_to_gradients(logits_mV, targets_M[rows], with_gradients, soft_cap)
            if with_gradients:
                dhidden_MD[rows] = logits_mV @ weight
            if weight_waits:
                kept = logits_mV
            elif sums:
                _add_product(kept, logits_mV.T, hidden_mD, is_first=start == 0)
    return loss, dhidden_MD, kept


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool) -> None:
    """Add a product to the sum of those before it; the first writes what has no value yet."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, beta=0.0 if is_first else 1.0)
    elif is_first:
        total.copy_(left @ right)
    else:
        total += left @ right


def _losses_to_gradients(
    logits_mV: Tensor, targets_m: Tensor, with_gradients: bool, soft_cap: float
) -> Tensor:
    """Return the summed loss; with gradients, overwrite the logits by its gradient."""
    if logits_mV.is_cuda and (kernels := triton_kernels()):
        return kernels.losses_to_gradients(logits_mV, targets_m, with_gradients, soft_cap)
    loss = torch.zeros((), dtype=torch.float32, device=logits_mV.device)
    num_rows = max(1, _BLOCK_ELEMENTS // logits_mV.shape[1])
    for start in range(0, logits_mV.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        is_counted_b1 = (targets_m[rows] >= 0)[:, None]
        index_b1 = targets_m[rows].clamp(min=0)[:, None]
        logits_bV = logits_mV[rows].float()
        if soft_cap:
            logits_bV = torch.tanh_(logits_bV / soft_cap).mul_(soft_cap)
        p_bV = torch.softmax(logits_bV, dim=-1)
        logp_b1 = p_bV.gather(1, index_b1).log()
        # A probability below float32's range asks for the slower formula. (On a GPU always: looking
        # would make the host wait for the device.)
        if p_bV.is_cuda or logp_b1.isinf().any():
            logp_b1 = torch.log_softmax(logits_bV, dim=-1).gather(1, index_b1)
        loss -= torch.where(is_counted_b1, logp_b1, 0.0).sum()
        if with_gradients:
            p_bV.scatter_add_(1, index_b1, p_bV.new_full((), -1.0).expand(index_b1.shape))
            if soft_cap:  # the derivative of the tanh
                p_bV.mul_(1 - (logits_bV / soft_cap).square_())
            logits_mV[rows] = p_bV.mul_(is_counted_b1)
    return loss


@_forward.register_fake
def _(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    targets_M: Tensor,
    dtype: torch.dtype,
    with_gradients: bool,
    soft_cap: float = 0.0,
    with_weight: bool = True,
    weight_waits: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=hidden_MD.device)
    sums = with_gradients and with_weight and not weight_waits
    dhidden_MD, kept = _empty_gradients(hidden_MD, weight_VD, with_gradients, sums)
    if weight_waits:
        kept = hidden_MD.new_empty((hidden_MD.shape[0], weight_VD.shape[0]), dtype=dtype)
    return loss, dhidden_MD, kept


def _empty_gradients(
    hidden_MD: Tensor, weight_VD: Tensor, of_hidden: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden_MD) if of_hidden else hidden_MD.new_empty(0),
        torch.empty_like(weight_VD) if of_weight else weight_VD.new_empty(0),
    )


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden_MD, weight_VD, *_, ctx.with_weight, ctx.weight_waits = inputs
    _, dhidden_MD, kept = output
    ctx.save_for_backward(dhidden_MD, kept, hidden_MD if ctx.weight_waits else None)
    ctx.dtype = weight_VD.dtype
    ctx.mark_non_differentiable(dhidden_MD, kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dhidden_MD, kept, hidden_MD = ctx.saved_tensors
    dweight_VD = None
    if ctx.weight_waits:
        dweight_VD = (kept.t() @ (hidden_MD * dloss).to(kept.dtype)).to(ctx.dtype)
    elif ctx.with_weight:
        dweight_VD = kept * dloss
    return dhidden_MD * dloss, dweight_VD, *[None] * 6


_forward.register_autograd(_backward, setup_context=_save)
