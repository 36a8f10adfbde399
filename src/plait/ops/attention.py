"""Causal attention for training and prefill, over all earlier tokens or a window of them.

On a CPU with bfloat16 dot products but no matrix tiles (AMX), PyTorch's flash kernel runs at a
third of the speed of its own batched matrix product; there the blocked kernel below is used, and
on every CPU for windows, as PyTorch's kernel multiplies what a mask then hides. Everywhere else the
work goes to `scaled_dot_product_attention`.
"""

# Shapes: B batch, T tokens, N query heads, K key-value heads (N = K * G), H head size.

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from plait.errors import ModelError
from plait.ops.work import WIDE, Work, num_bytes

# Queries are handled in blocks, so that the scores of one block stay in cache. Measured on Zen 4:
# 128 and 256 rows are within noise of each other, 64 and 512 are slower.
_BLOCK_TOKENS = 128


def causal_attention(
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """Attend to the same and all earlier tokens: (B, N, T, H) in the dtype of the queries.

    window: how many tokens back a token sees, itself included; None = all. Raises ModelError for
    shapes that do not fit and a window below 1.
    """
    _check(q_BNTH, k_BKTH, v_BKTH, window)
    num_tokens = q_BNTH.shape[2]
    if window is not None and window >= num_tokens:
        window = None
    if uses_blocked_kernel(q_BNTH) or (window is not None and q_BNTH.device.type == "cpu"):
        return torch.ops.plait.blocked_causal_attention(
            q_BNTH, k_BKTH, v_BKTH, scale, *(() if window is None else (window,))
        )
    hidden = None if window is None else ~_hidden(num_tokens, window, q_BNTH.device)
    return scaled_dot_product_attention(
        q_BNTH,
        k_BKTH,
        v_BKTH,
        attn_mask=hidden,
        is_causal=window is None,
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
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, *, scale: float, window: int | None = None
) -> Tensor:
    """Compute the textbook formula, with the whole score matrix in memory."""
    groups = q_BNTH.shape[1] // k_BKTH.shape[1]
    k_BNTH = k_BKTH.repeat_interleave(groups, dim=1)
    v_BNTH = v_BKTH.repeat_interleave(groups, dim=1)
    scores_BNTT = q_BNTH @ k_BNTH.transpose(-1, -2) * scale
    num_tokens = q_BNTH.shape[2]
    hidden_TT = _hidden(num_tokens, window or num_tokens, q_BNTH.device)
    return scores_BNTT.masked_fill(hidden_TT, float("-inf")).softmax(dim=-1) @ v_BNTH


def causal_pairs(num_queries: int, num_keys: int, window: int | None = None) -> int:
    """How many keys all queries see together, the queries being the last of what has keys."""
    before = num_keys - num_queries
    window = min(window or num_keys, num_keys)
    rising = min(max(window - before, 0), num_queries)  # queries that see the first key too
    return rising * before + rising * (rising + 1) // 2 + (num_queries - rising) * window


def causal_attention_work(
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, *, window: int | None = None
) -> tuple[Work, Work]:
    """Two products forward, five backward [Dao 2023, arXiv:2307.08691, section 4.1]."""
    pairs = causal_pairs(q_BNTH.shape[2], k_BKTH.shape[2], window)
    num_products = q_BNTH.shape[0] * q_BNTH.shape[1] * pairs
    flops = 2 * num_products * (q_BNTH.shape[3] + v_BKTH.shape[3])
    moved = num_bytes(q_BNTH, k_BKTH, v_BKTH, q_BNTH)
    return Work(flops=flops, bytes=moved), Work(
        flops=flops * 5 // 2, bytes=moved + num_bytes(q_BNTH, q_BNTH, k_BKTH, v_BKTH)
    )


def _check(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, window: int | None) -> None:
    shapes = [tuple(t.shape) for t in (q_BNTH, k_BKTH, v_BKTH)]
    if any(len(shape) != 4 for shape in shapes) or (
        shapes[1] != shapes[2]
        or shapes[0][0] != shapes[1][0]
        or shapes[0][2:] != shapes[1][2:]
        or shapes[0][1] % max(shapes[1][1], 1)
    ):
        raise ModelError(
            "causal_attention needs queries (B, K * G, T, H), keys and values (B, K, T, H), "
            f"got {shapes}."
        )
    if window is not None and window < 1:
        raise ModelError(f"causal_attention needs a window of at least 1 token, got {window}.")


def _hidden(num_tokens: int, window: int, device: torch.device) -> Tensor:
    """True where a query (line) does not see a key (column)."""
    ones_TT = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device)
    return ones_TT.triu(1) | ones_TT.tril(-window)


@torch.library.custom_op("plait::blocked_causal_attention", mutates_args=())
def _blocked(
    q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, scale: float, window: int = 0
) -> Tensor:
    output_BNTH = torch.empty_like(q_BNTH, memory_format=torch.contiguous_format)
    for block in _blocks(q_BNTH):
        seen = _seen(q_BNTH, k_BKTH, block, window)
        p_Xbe = _probabilities(q_BNTH, k_BKTH, scale, block, window)
        rows = torch.bmm(p_Xbe, _flat(v_BKTH[:, :, seen]))
        output_BNTH[:, :, block] = rows.view(output_BNTH[:, :, block].shape)
    return output_BNTH


@_blocked.register_fake
def _(q_BNTH: Tensor, k_BKTH: Tensor, v_BKTH: Tensor, scale: float, window: int = 0) -> Tensor:
    return torch.empty_like(q_BNTH, memory_format=torch.contiguous_format)


@torch.library.custom_op("plait::blocked_causal_attention_backward", mutates_args=())
def _blocked_backward(
    dout_BNTH: Tensor,
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    scale: float,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    # The probabilities are computed again: keeping them saves 6 % of the time and costs T * T
    # memory.
    dq_BNTH = torch.empty_like(q_BNTH, memory_format=torch.contiguous_format)
    dk_XTH = torch.zeros(_flat(k_BKTH).shape, dtype=WIDE.get(k_BKTH.dtype, torch.float32))
    dv_XTH = torch.zeros_like(dk_XTH)
    for block in _blocks(q_BNTH):
        seen = _seen(q_BNTH, k_BKTH, block, window)
        p_Xbe = _probabilities(q_BNTH, k_BKTH, scale, block, window)
        dout_XbH = _rows(dout_BNTH[:, :, block], k_BKTH)
        dv_XTH[:, seen] += torch.bmm(p_Xbe.transpose(1, 2), dout_XbH)
        dp_Xbe = torch.bmm(dout_XbH, _flat(v_BKTH[:, :, seen]).transpose(1, 2))
        ds_Xbe = torch.ops.aten._softmax_backward_data(dp_Xbe, p_Xbe, -1, p_Xbe.dtype)
        dq_XbH = torch.bmm(ds_Xbe, _flat(k_BKTH[:, :, seen])).mul_(scale)
        dq_BNTH[:, :, block] = dq_XbH.view(dq_BNTH[:, :, block].shape)
        dk_XTH[:, seen] += torch.bmm(
            ds_Xbe.transpose(1, 2), _rows(q_BNTH[:, :, block], k_BKTH) * scale
        )
    return (
        dq_BNTH,
        dk_XTH.to(k_BKTH.dtype).view(k_BKTH.shape),
        dv_XTH.to(v_BKTH.dtype).view(v_BKTH.shape),
    )


@_blocked_backward.register_fake
def _(
    dout_BNTH: Tensor,
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    scale: float,
    window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    new = torch.contiguous_format
    return (
        torch.empty_like(q_BNTH, memory_format=new),
        torch.empty_like(k_BKTH, memory_format=new),
        torch.empty_like(v_BKTH, memory_format=new),
    )


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout_BNTH: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
    settings = (ctx.scale, ctx.window) if ctx.window else (ctx.scale,)
    dq, dk, dv = torch.ops.plait.blocked_causal_attention_backward(
        dout_BNTH, *ctx.saved_tensors, *settings
    )
    return dq, dk, dv, None, None


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


def _seen(q_BNTH: Tensor, k_BKTH: Tensor, block: slice, window: int) -> slice:
    """The keys that any query of the block sees.

    The queries are the last of the positions that have keys.
    """
    before = k_BKTH.shape[2] - q_BNTH.shape[2]
    first = max(before + block.start - window + 1, 0) if window else 0
    return slice(first, before + block.stop)


def _probabilities(
    q_BNTH: Tensor, k_BKTH: Tensor, scale: float, block: slice, window: int
) -> Tensor:
    """Softmax over the keys that the block sees: (B * K, G * b, e)."""
    seen = _seen(q_BNTH, k_BKTH, block, window)
    q_XbH = _rows(q_BNTH[:, :, block], k_BKTH) * scale
    scores_Xbe = torch.bmm(q_XbH, _flat(k_BKTH[:, :, seen]).transpose(1, 2))
    num_rows, num_seen = block.stop - block.start, seen.stop - seen.start
    hidden_bb = torch.full((num_rows, num_rows), float("-inf"), dtype=q_BNTH.dtype)
    scores_Xgbe = scores_Xbe.view(scores_Xbe.shape[0], -1, num_rows, num_seen)
    scores_Xgbe[..., num_seen - num_rows :] += hidden_bb.triu(1)
    # Of the first key that the block sees, how many keys before is the first that query 0 sees?
    ahead = num_seen - num_rows - window + 1
    if window and ahead > -num_rows:
        scores_Xgbe[..., :num_rows] += hidden_bb.tril(ahead - 1)
    return torch.softmax(scores_Xbe, dim=-1)
