"""Causal attention of the last queries only: T of them, to S >= T keys that end with their own.

PyTorch's flash kernels let query i see key i, whatever their numbers. Here the queries are the last
ones, as the parts of a sequence need it: all keys before them, then causally their own. Each of the
two is one call of the kernel; their results are weighted by their sums of exponentials, and the
backward of each needs the result and the logarithm of the sum over both
[Liu et al. 2023, arXiv 2310.01889, section 3].
"""

# Shapes: B batch, N query heads, K key-value heads (N = K * G), T queries, S keys, P = S - T keys
# before them, H head size.

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@torch.library.custom_op("plait::causal_part_attention", mutates_args=())
def _part(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result, (B, N, T, H), and the logarithm of the sum of exponentials, (B, N, T)."""
    before = k_BKSH.shape[2] - q_BNTH.shape[2]
    k_own, v_own = k_BKSH[:, :, before:], v_BKSH[:, :, before:]
    out_BNTH, lse_BNT = _flash(q_BNTH, k_own, v_own, 0.0, True, scale=scale)
    if before == 0:
        return out_BNTH, lse_BNT
    k_before, v_before = k_BKSH[:, :, :before], v_BKSH[:, :, :before]
    other_BNTH, other_BNT = _flash(q_BNTH, k_before, v_before, 0.0, False, scale=scale)
    weight_BNT1 = torch.sigmoid(other_BNT - lse_BNT).unsqueeze(-1).to(out_BNTH.dtype)
    lse_BNT = torch.logaddexp(lse_BNT, other_BNT)
    return torch.lerp(out_BNTH, other_BNTH, weight_BNT1), lse_BNT


@_part.register_fake
def _(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, num_heads, num_tokens, _ = q_BNTH.shape
    wide = torch.promote_types(q_BNTH.dtype, torch.float32)
    lse_BTN = q_BNTH.new_empty(batch, num_tokens, num_heads, dtype=wide)
    return _new_by_tokens(q_BNTH), lse_BTN.transpose(1, 2)


@torch.library.custom_op("plait::causal_part_attention_backward", mutates_args=())
def _part_backward(
    dout_BNTH: Tensor,
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    out_BNTH: Tensor,
    lse_BNT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, and of all keys and values that they see."""
    before = k_BKSH.shape[2] - q_BNTH.shape[2]

    def backward(keys: slice, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        seen = (k_BKSH[:, :, keys], v_BKSH[:, :, keys], out_BNTH, lse_BNT, 0.0, is_causal)
        return _flash_backward(dout_BNTH, q_BNTH, *seen, scale=scale)

    dq, dk, dv = backward(slice(before, None), True)
    if before:
        dq_before, dk_before, dv_before = backward(slice(before), False)
        dq = dq_before.add_(dq)
        dk, dv = _together(dk_before, dk), _together(dv_before, dv)
    return _by_tokens(dq), _by_tokens(dk), _by_tokens(dv)


@_part_backward.register_fake
def _(
    dout_BNTH: Tensor,
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    out_BNTH: Tensor,
    lse_BNT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_by_tokens(q_BNTH), _new_by_tokens(k_BKSH), _new_by_tokens(v_BKSH)


def _by_tokens(x_BNTH: Tensor) -> Tensor:
    """Laid out as (B, T, N, H), as PyTorch's kernels lay out what they make."""
    return x_BNTH.transpose(1, 2).contiguous().transpose(1, 2)


def _new_by_tokens(x_BNTH: Tensor) -> Tensor:
    batch, num_heads, num_tokens, head_size = x_BNTH.shape
    return x_BNTH.new_empty(batch, num_tokens, num_heads, head_size).transpose(1, 2)


def _together(x_BKPH: Tensor, y_BKTH: Tensor) -> Tensor:
    return torch.cat([x_BKPH.transpose(1, 2), y_BKTH.transpose(1, 2)], dim=1).transpose(1, 2)
