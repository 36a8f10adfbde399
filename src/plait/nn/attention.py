"""Grouped-query self-attention with rotary positions; queries and keys normalized on request."""

# Shapes: B batch, T tokens, S tokens held, N query heads, K key-value heads, H head size,
# D model width, R the part of a head that is turned.

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from plait.nn.kv_cache import KVCache
from plait.nn.linear import StrictLinear, make_linear
from plait.nn.norm import NormKind, make_norm
from plait.nn.rotary import rotate
from plait.ops.attention import causal_attention, soft_capped_attention
from plait.ops.numerics import Numerics
from plait.ops.strict_attention import strict_causal_attention

QKNormSpan = Literal["head", "all_heads"]


@dataclass(frozen=True)
class AttentionInputs:
    """What layers of one kind share in a forward: the rotation of each token, who may see whom.

    cos, sin: None in layers without rotary positions.
    mask: boolean (B, 1, T, S), True where a query may look; None = causal without a cache, or one
    token that may see everything. Strict numerics are always causal and take none.
    """

    cos_B1TR: Tensor | None
    sin_B1TR: Tensor | None
    mask_B1TS: Tensor | None
    cache: KVCache | None

    def turn(self, x_BNTH: Tensor) -> Tensor:
        """Rotate queries or keys to their positions."""
        if self.cos_B1TR is None or self.sin_B1TR is None:
            return x_BNTH
        return rotate(x_BNTH, self.cos_B1TR, self.sin_B1TR)


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """Shape of an attention layer, and the switches by which families differ.

    output_bias: of the projection behind the attention. fused: queries, keys and values come from
    one matrix, in this order. qk_norm_span: what a norm of queries and keys reaches over.
    scale: of the scores. soft_cap: bound on them.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    bias: bool = False
    output_bias: bool = False
    fused: bool = False
    qk_norm_eps: float | None = None
    qk_norm_kind: NormKind = "rms"
    qk_norm_span: QKNormSpan = "head"
    scale: float
    soft_cap: float | None = None
    numerics: Numerics = "fast"


class Attention(nn.Module):
    """softmax(scale * q k^T) v over earlier tokens, K key-value heads shared by N query heads."""

    def __init__(self, settings: AttentionSettings, *, layer: int) -> None:
        """Make the projections, and the norms of queries and keys if asked for (Qwen3)."""
        super().__init__()
        self.settings = settings
        self.head_size = settings.head_size
        self.layer = layer
        size, width = settings.head_size, settings.hidden_size
        sizes = [n * size for n in (settings.num_heads, settings.num_kv_heads)]

        def project(in_size: int, out_size: int, bias: bool) -> nn.Linear | StrictLinear:
            return make_linear(in_size, out_size, bias=bias, numerics=settings.numerics)

        if settings.fused:
            self.qkv_proj = project(width, sizes[0] + 2 * sizes[1], settings.bias)
        else:
            self.q_proj = project(width, sizes[0], settings.bias)
            self.k_proj = project(width, sizes[1], settings.bias)
            self.v_proj = project(width, sizes[1], settings.bias)
        self.o_proj = project(sizes[0], width, settings.output_bias)
        self.q_norm = self.k_norm = None
        if settings.qk_norm_eps is not None:
            spans = (size, size) if settings.qk_norm_span == "head" else sizes
            self.q_norm, self.k_norm = (
                make_norm(settings.qk_norm_kind, span, eps=settings.qk_norm_eps) for span in spans
            )

    def forward(self, x_BTD: Tensor, shared: AttentionInputs) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        settings = self.settings
        if settings.fused:
            qkv_BTX = self.qkv_proj(x_BTD)
            # In proportion: of a model spread over ranks, each has its own part of the heads.
            group = settings.num_heads // settings.num_kv_heads
            size = qkv_BTX.shape[-1] // (group + 2)
            q_BTX, k_BTX, v_BTX = qkv_BTX.split((group * size, size, size), dim=-1)
            q_BNTH = shared.turn(self._heads(q_BTX, self.q_norm))
            k_BKTH = shared.turn(self._heads(k_BTX, self.k_norm))
            v_BKTH = self._heads(v_BTX, None)
        else:
            q_BNTH = shared.turn(self._heads(self.q_proj(x_BTD), self.q_norm))
            k_BKTH = shared.turn(self._heads(self.k_proj(x_BTD), self.k_norm))
            v_BKTH = self._heads(self.v_proj(x_BTD), None)
        if shared.cache is not None:
            k_BKTH, v_BKTH = shared.cache.append(self.layer, k_BKTH, v_BKTH)
        if settings.numerics == "strict":
            attended_BNTH = strict_causal_attention(q_BNTH, k_BKTH, v_BKTH, scale=settings.scale)
        else:
            attended_BNTH = attend(
                q_BNTH,
                k_BKTH,
                v_BKTH,
                mask_B1TS=shared.mask_B1TS,
                scale=settings.scale,
                soft_cap=settings.soft_cap,
            )
        return self.o_proj(attended_BNTH.transpose(1, 2).flatten(2))

    def _heads(self, x_BTX: Tensor, norm: nn.Module | None) -> Tensor:
        """Cut X = N * H into heads, normalized: (B, N, T, H)."""
        if norm is not None and self.settings.qk_norm_span == "all_heads":
            return norm(x_BTX).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        heads_BTNH = x_BTX.unflatten(-1, (-1, self.head_size))
        return (heads_BTNH if norm is None else norm(heads_BTNH)).transpose(1, 2)


def attend(
    q_BNTH: Tensor,
    k_BKSH: Tensor,
    v_BKSV: Tensor,
    *,
    mask_B1TS: Tensor | None,
    scale: float,
    soft_cap: float | None = None,
) -> Tensor:
    """Attend as `AttentionInputs.mask_B1TS` says: (B, N, T, V), V being the size of a value."""
    if soft_cap is not None:
        return soft_capped_attention(
            q_BNTH, k_BKSH, v_BKSV, scale=scale, soft_cap=soft_cap, mask_B1TS=mask_B1TS
        )
    num_tokens, num_held = q_BNTH.shape[2], k_BKSH.shape[2]
    is_causal = mask_B1TS is None and num_tokens == num_held and num_tokens > 1
    if is_causal and k_BKSH.shape[-1] == v_BKSV.shape[-1]:
        return causal_attention(q_BNTH, k_BKSH, v_BKSV, scale=scale)
    enable_gqa = q_BNTH.shape[1] != k_BKSH.shape[1]
    return scaled_dot_product_attention(
        q_BNTH,
        k_BKSH,
        v_BKSV,
        attn_mask=mask_B1TS,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def attention_mask(
    *,
    num_tokens: int,
    num_held: int,
    segments_BT: Tensor | None,
    device: torch.device,
    window: int | None = None,
) -> Tensor | None:
    """Say who may see whom (`AttentionInputs`); the queries are the last of the held tokens.

    window: how many tokens back a token sees, itself included; None = all.
    """
    if window is not None and num_held <= window:
        window = None
    if segments_BT is None and window is None and (num_tokens == 1 or num_tokens == num_held):
        return None
    queries_T1 = torch.arange(num_held - num_tokens, num_held, device=device)[:, None]
    keys_S = torch.arange(num_held, device=device)
    mask_TS = queries_T1 >= keys_S
    if window is not None:
        mask_TS = mask_TS & (queries_T1 - keys_S < window)
    if segments_BT is None:
        return mask_TS[None, None]
    return (mask_TS & (segments_BT[:, :, None] == segments_BT[:, None, :]))[:, None]
