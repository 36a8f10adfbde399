"""Causal attention for training and prefill.

On a CPU with bfloat16 dot products but no matrix tiles (AMX), PyTorch's flash kernel runs at a
third of the speed of its own batched matrix product; there the blocked kernel below is used.
Everywhere else the work goes to `scaled_dot_product_attention`.
"""

# Shapes: B batch, T tokens, N query heads, K key-value heads (N = K * G), H head size.

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Queries are handled in blocks, so that the scores of one block stay in cache. Measured on Zen 4:
# 128 and 256 rows are within noise of each other, 64 and 512 are slower.
_BLOCK_TOKENS = 128


def causal_attention(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, *, scale: float) -> Tensor:
    """Attend to the same and all earlier tokens: (B, N, T, H) in the dtype of the queries."""
    if uses_blocked_kernel(q_BNTH):
        return torch.ops.plait.blocked_causal_attention(q_BNTH, k_BKTH, v_BKTH, scale)
    return scaled_dot_product_attention(
        q_BNTH,
        k_BKTH,
        v_BKTH,
        is_causal=True,
        scale=scale,
        enable_gqa=q_BNTH.shape[1] != k_BKTH.shape[1],
    )


def soft_capped_attention(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSH: Tensor,
    *,
    scale: float,
    soft_cap: float,
    mask_B1TS: Tensor | None,
) -> Tensor:
    """Attend with scores cap * tanh(score / cap) [Gemma 2, arXiv:2408.00118, section 2].

    mask: True where a query may look; None = the queries are the last tokens and look back. The
    softmax is float32. Scores are held whole: B * N * T * S of them.
    """
    groups = q_BNTH.shape[1] // k_BKSH.shape[1]
    k_BNSH = k_BKSH.repeat_interleave(groups, dim=1) if groups > 1 else k_BKSH
    v_BNSH = v_BKSH.repeat_interleave(groups, dim=1) if groups > 1 else v_BKSH
    scores_BNTS = torch.tanh(q_BNTH @ k_BNSH.transpose(-1, -2) * (scale / soft_cap)) * soft_cap
    if mask_B1TS is None:
        num_tokens, num_held = scores_BNTS.shape[-2:]
        ones_TS = torch.ones(num_tokens, num_held, dtype=torch.bool, device=q_BNTH.device)
        mask_B1TS = ones_TS.tril(num_held - num_tokens)
    scores_BNTS = scores_BNTS.masked_fill(~mask_B1TS, float("-inf"))
    return scores_BNTS.softmax(dim=-1, dtype=torch.float32).to(v_BNSH.dtype) @ v_BNSH


def uses_blocked_kernel(q_BNTH: Tensor) -> bool:
    """Say whether `causal_attention` takes the blocked kernel for these queries."""
    return q_BNTH.device.type == "cpu" and q_BNTH.dtype == torch.bfloat16 and blocked_kernel_pays()


@torch.compiler.assume_constant_result
def blocked_kernel_pays() -> bool:
    """Say whether this CPU multiplies bfloat16 natively but has no matrix tiles.

    Capture takes the answer as a constant. Either kernel runs on any CPU, so a captured graph
    stays right when it is moved; only its speed may not be the best.
    """
    return torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def reference_causal_attention(
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, *, scale: float
) -> Tensor:
    """Compute the textbook formula, with the whole score matrix in memory."""
    groups = q_BNTH.shape[1] // k_BKTH.shape[1]
    k_BNTH = k_BKTH.repeat_interleave(groups, dim=1)
    v_BNTH = v_BKTH.repeat_interleave(groups, dim=1)
    scores_BNTT = q_BNTH @ k_BNTH.transpose(-1, -2) * scale
    later_TT = torch.ones(scores_BNTT.shape[-2:], dtype=torch.bool, device=q_BNTH.device).triu(1)
    return scores_BNTT.masked_fill(later_TT, float("-inf")).softmax(dim=-1) @ v_BNTH


@torch.library.custom_op("plait::blocked_causal_attention", mutates_args=())
def _blocked(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, scale: float) -> Tensor:
    output_BNTH = torch.empty_like(q_BNTH, memory_format=torch.contiguous_format)
    for block in _blocks(q_BNTH):
        p_Xbe = _probabilities(q_BNTH, k_BKTH, scale, block)
        rows = torch.bmm(p_Xbe, _flat(v_BKTH[:, :, : p_Xbe.shape[2]]))
        output_BNTH[:, :, block] = rows.view(output_BNTH[:, :, block].shape)
    return output_BNTH


@_blocked.register_fake
def _(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q_BNTH, memory_format=torch.contiguous_format)


@torch.library.custom_op("plait::blocked_causal_attention_backward", mutates_args=())
def _blocked_backward(
    dout_BNTH: Tensor, q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # The probabilities are computed again: keeping them saves 6 % of the time and costs T * T
    # memory.
    dq_BNTH = torch.empty_like(q_BNTH, memory_format=torch.contiguous_format)
    dk_XTH = torch.zeros(_flat(k_BKTH).shape, dtype=torch.float32)
    dv_XTH = torch.zeros_like(dk_XTH)
    for block in _blocks(q_BNTH):
        p_Xbe = _probabilities(q_BNTH, k_BKTH, scale, block)
        num_seen = p_Xbe.shape[2]
        dout_XbH = _rows(dout_BNTH[:, :, block], k_BKTH)
        dv_XTH[:, :num_seen] += torch.bmm(p_Xbe.transpose(1, 2), dout_XbH)
        dp_Xbe = torch.bmm(dout_XbH, _flat(v_BKTH[:, :, :num_seen]).transpose(1, 2))
        ds_Xbe = torch.ops.aten._softmax_backward_data(dp_Xbe, p_Xbe, -1, p_Xbe.dtype)
        dq_XbH = torch.bmm(ds_Xbe, _flat(k_BKTH[:, :, :num_seen])).mul_(scale)
        dq_BNTH[:, :, block] = dq_XbH.view(dq_BNTH[:, :, block].shape)
        dk_XTH[:, :num_seen] += torch.bmm(
            ds_Xbe.transpose(1, 2), _rows(q_BNTH[:, :, block], k_BKTH) * scale
        )
    return (
        dq_BNTH,
        dk_XTH.to(k_BKTH.dtype).view(k_BKTH.shape),
        dv_XTH.to(v_BKTH.dtype).view(v_BKTH.shape),
    )


@_blocked_backward.register_fake
def _(
    dout_BNTH: Tensor, q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    new = torch.contiguous_format
    return (
        torch.empty_like(q_BNTH, memory_format=new),
        torch.empty_like(k_BKTH, memory_format=new),
        torch.empty_like(v_BKTH, memory_format=new),
    )


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout_BNTH: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dq, dk, dv = torch.ops.plait.blocked_causal_attention_backward(
        dout_BNTH, *ctx.saved_tensors, ctx.scale
    )
    return dq, dk, dv, None


_blocked.register_autograd(_backward, setup_context=_save)


def _blocks(q_BNTH: Tensor) -> list[slice]:
    num_tokens = q_BNTH.shape[2]
    return [
        slice(s, min(s + _BLOCK_TOKENS, num_tokens)) for s in range(0, num_tokens, _BLOCK_TOKENS)
    ]


def _flat(x_BKTH: Tensor) -> Tensor:
    """One matrix for each sequence and key-value head: (B * K, T, H)."""
    return x_BKTH.reshape(-1, *x_BKTH.shape[2:])


def _rows(x_BNbH: Tensor, k_BKTH: Tensor) -> Tensor:
    """The query heads that share a key-value head, below each other: (B * K, G * b, H)."""
    return x_BNbH.reshape(k_BKTH.shape[0] * k_BKTH.shape[1], -1, x_BNbH.shape[-1])


def _probabilities(q_BNTH: Tensor, k_BKTH: Tensor, scale: float, block: slice) -> Tensor:
    """Softmax over the keys up to the end of the block: (B * K, G * b, e).

    The queries are the last of the positions that have keys.
    """
    before = k_BKTH.shape[2] - q_BNTH.shape[2]
    start, stop = before + block.start, before + block.stop
    q_XbH = _rows(q_BNTH[:, :, block], k_BKTH) * scale
    scores_Xbe = torch.bmm(q_XbH, _flat(k_BKTH[:, :, :stop]).transpose(1, 2))
    num_rows = stop - start
    later_bb = torch.full((num_rows, num_rows), float("-inf"), dtype=q_BNTH.dtype).triu_(1)
    diagonal = scores_Xbe.view(scores_Xbe.shape[0], -1, num_rows, stop)[..., start:]
    diagonal += later_bb
    return torch.softmax(scores_Xbe, dim=-1)
