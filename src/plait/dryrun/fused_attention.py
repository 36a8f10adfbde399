"""Causal attention as the one kernel that it is on a GPU, whatever the CPU that captures it has.

Which kernel a CPU takes depends on its instructions. Values narrower than keys it has no kernel
for: PyTorch writes latent attention out as products and a softmax over the square of scores. While
pieces are captured both are operators of Plait's, which keep what FlashAttention does: operands,
and the result that the next product needs anyway [Dao 2023, arXiv 2307.08691, section 2.3;
FlashAttention-3 has kernels for keys of 192 and values of 128].
"""

# Shapes: B batch, N heads, T tokens, H size of a key, V size of a value.

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from plait.nn import latent_attention
from plait.nn.attention import attend
from plait.ops import attention
from plait.ops.attention import reference_causal_attention


@contextmanager
def gpu_attention() -> Generator[None]:
    """Within, causal attention of Plait's models is one operator, the same on every machine."""
    with (
        patch.object(latent_attention, "attend", _attend),
        patch.object(attention, "uses_blocked_kernel", _always),
    ):
        yield


def _always(q_BNTH: Tensor) -> bool:
    del q_BNTH
    return True


def _attend(
    q_BNTH: Tensor, k_BNTH: Tensor, v_BNTV: Tensor, *, mask_B1TS: Tensor | None, scale: float
) -> Tensor:
    if mask_B1TS is not None or q_BNTH.shape[2] != k_BNTH.shape[2]:
        return attend(q_BNTH, k_BNTH, v_BNTV, mask_B1TS=mask_B1TS, scale=scale)
    return torch.ops.plait.latent_causal_attention(q_BNTH, k_BNTH, v_BNTV, scale)


@torch.library.custom_op("plait::latent_causal_attention", mutates_args=())
def _latent(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTV: Tensor, scale: float) -> Tensor:
    return reference_causal_attention(q_BNTH, k_BNTH, v_BNTV, scale=scale)


@_latent.register_fake
def _(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTV: Tensor, scale: float) -> Tensor:
    return q_BNTH.new_empty((*q_BNTH.shape[:3], v_BNTV.shape[-1]))


@torch.library.custom_op("plait::latent_causal_attention_backward", mutates_args=())
def _latent_backward(
    dout_BNTV: Tensor,
    q_BNTH: Tensor,
    k_BNTH: Tensor,
    v_BNTV: Tensor,
    out_BNTV: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    del out_BNTV  # a kernel takes the row sums of dout * out instead of probabilities * their own
    scores_BNTT = q_BNTH @ k_BNTH.transpose(-1, -2) * scale
    later_TT = torch.ones(scores_BNTT.shape[-2:], dtype=torch.bool, device=q_BNTH.device).triu(1)
    p_BNTT = scores_BNTT.masked_fill(later_TT, float("-inf")).softmax(dim=-1)
    dp_BNTT = dout_BNTV @ v_BNTV.transpose(-1, -2)
    ds_BNTT = p_BNTT * (dp_BNTT - (dp_BNTT * p_BNTT).sum(-1, keepdim=True)) * scale
    return (
        ds_BNTT @ k_BNTH,
        ds_BNTT.transpose(-1, -2) @ q_BNTH,
        p_BNTT.transpose(-1, -2) @ dout_BNTV,
    )


@_latent_backward.register_fake
def _(
    dout_BNTV: Tensor,
    q_BNTH: Tensor,
    k_BNTH: Tensor,
    v_BNTV: Tensor,
    out_BNTV: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty(x.shape) for x in (q_BNTH, k_BNTH, v_BNTV))
    return q, k, v


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3], output)
    ctx.scale = inputs[3]


def _differentiate(ctx: Any, dout_BNTV: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    gradients = torch.ops.plait.latent_causal_attention_backward(
        dout_BNTV, *ctx.saved_tensors, ctx.scale
    )
    return (*gradients, None)


_latent.register_autograd(_differentiate, setup_context=_keep)
