"""Grouped-query self-attention with rotary positions; queries and keys normalized on request."""

# Shapes: B batch, T tokens, S tokens held, N query heads, K key-value heads, H head size,
# D model width.

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from plait.nn.kv_cache import KVCache
from plait.nn.linear import make_linear
from plait.nn.norm import RMSNorm
from plait.nn.rotary import rotate
from plait.ops.attention import causal_attention
from plait.ops.numerics import Numerics
from plait.ops.strict_attention import strict_causal_attention


@dataclass(frozen=True)
class AttentionInputs:
    """What all layers of one forward share: the rotation of each token, and who may see whom.

    mask: boolean (B, 1, T, S), True where a query may look; None = causal without a cache, or one
    token that may see everything. Strict numerics are always causal and take none.
    """

    cos_B1TH: Tensor
    sin_B1TH: Tensor
    mask_B1TS: Tensor | None
    cache: KVCache | None


class Attention(nn.Module):
    """softmax(q k^T / sqrt(H)) v over earlier tokens, K key-value heads shared by N query heads."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        bias: bool,
        qk_norm_eps: float | None,
        layer: int,
        numerics: Numerics = "fast",
    ) -> None:
        """Make the four projections; `qk_norm_eps` asks for normalized queries and keys (Qwen3)."""
        super().__init__()
        self.head_size = head_size
        self.layer = layer
        self.numerics: Numerics = numerics
        self.q_proj = make_linear(hidden_size, num_heads * head_size, bias=bias, numerics=numerics)
        self.k_proj = make_linear(
            hidden_size, num_kv_heads * head_size, bias=bias, numerics=numerics
        )
        self.v_proj = make_linear(
            hidden_size, num_kv_heads * head_size, bias=bias, numerics=numerics
        )
        self.o_proj = make_linear(num_heads * head_size, hidden_size, bias=bias, numerics=numerics)
        self.q_norm = None if qk_norm_eps is None else RMSNorm(head_size, eps=qk_norm_eps)
        self.k_norm = None if qk_norm_eps is None else RMSNorm(head_size, eps=qk_norm_eps)

    def forward(self, x_BTD: Tensor, shared: AttentionInputs) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        q_BNTH = rotate(
            self._heads(self.q_proj, self.q_norm, x_BTD), shared.cos_B1TH, shared.sin_B1TH
        )
        k_BKTH = rotate(
            self._heads(self.k_proj, self.k_norm, x_BTD), shared.cos_B1TH, shared.sin_B1TH
        )
        v_BKTH = self._heads(self.v_proj, None, x_BTD)
        if shared.cache is not None:
            k_BKTH, v_BKTH = shared.cache.append(self.layer, k_BKTH, v_BKTH)
        scale = self.head_size**-0.5
        if self.numerics == "strict":
            attended_BNTH = strict_causal_attention(q_BNTH, k_BKTH, v_BKTH, scale=scale)
        else:
            attended_BNTH = _attend(q_BNTH, k_BKTH, v_BKTH, shared.mask_B1TS, scale)
        return self.o_proj(attended_BNTH.transpose(1, 2).flatten(2))

    def _heads(self, projection: nn.Module, norm: RMSNorm | None, x_BTD: Tensor) -> Tensor:
        heads_BTNH = projection(x_BTD).unflatten(-1, (-1, self.head_size))
        return (heads_BTNH if norm is None else norm(heads_BTNH)).transpose(1, 2)


def _attend(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, mask_B1TS: Tensor | None, scale: float
) -> Tensor:
    num_tokens, num_held = q_BNTH.shape[2], k_BKSH.shape[2]
    if mask_B1TS is None and num_tokens == num_held and num_tokens > 1:
        return causal_attention(q_BNTH, k_BKSH, v_BKSH, scale=scale)
    enable_gqa = q_BNTH.shape[1] != k_BKSH.shape[1]
    return scaled_dot_product_attention(
        q_BNTH, k_BKSH, v_BKSH, attn_mask=mask_B1TS, scale=scale, enable_gqa=enable_gqa
    )


def attention_mask(
    *, num_tokens: int, num_held: int, segments_BT: Tensor | None, device: torch.device
) -> Tensor | None:
    """Say who may see whom (`AttentionInputs`); the queries are the last of the held tokens."""
    if segments_BT is None and (num_tokens == 1 or num_tokens == num_held):
        return None
    last_query = torch.arange(num_held - num_tokens, num_held, device=device)
    mask_TS = last_query[:, None] >= torch.arange(num_held, device=device)
    if segments_BT is None:
        return mask_TS[None, None]
    return (mask_TS & (segments_BT[:, :, None] == segments_BT[:, None, :]))[:, None]
