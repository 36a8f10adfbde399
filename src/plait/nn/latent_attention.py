"""Latent attention: keys and values come from one short vector a token, all that a cache holds.

[DeepSeek-V2, arXiv:2405.04434, section 2.1]. Names are those of the checkpoints.
"""

# Shapes: B batch, T tokens, S tokens held, N heads, D model width, L rank of the latent vectors,
# P size of the part without positions, R of the rotary part, V of a value.

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.errors import ModelError
from plait.nn.attention import AttentionInputs, attend
from plait.nn.norm import RMSNorm
from plait.nn.rotary import deinterleave

_EPS = 1e-6
"""Of the norms of the latent vectors; the reference code does not take it from the config."""


@dataclass(frozen=True, kw_only=True)
class LatentSettings:
    """Sizes of latent attention.

    query_rank: of the queries' latent vectors, None = queries are projected at once.
    plain_size, rotary_size: of the two parts of a key. interleaved: pairs stand side by side.
    """

    query_rank: int | None
    rank: int
    plain_size: int
    rotary_size: int
    value_size: int
    interleaved: bool = True

    def __post_init__(self) -> None:
        """Check what would otherwise fail deep inside."""
        if min(self.rank, self.plain_size, self.rotary_size, self.value_size) < 1:
            raise ModelError("latent attention needs rank and sizes of at least 1.")
        if self.rotary_size % 2:
            raise ModelError(f"rotary_size={self.rotary_size} is odd; rotary positions need pairs.")


class LatentAttention(nn.Module):
    """Attention whose keys and values are linear in a latent vector (B, T, L) and a rotary part."""

    def __init__(
        self,
        settings: LatentSettings,
        *,
        hidden_size: int,
        num_heads: int,
        bias: bool,
        score_factor: float,
        layer: int,
    ) -> None:
        """Make the projections; score_factor multiplies the usual scale of the scores."""
        super().__init__()
        self.settings = settings
        self.layer = layer
        key_size = settings.plain_size + settings.rotary_size
        self.scale = key_size**-0.5 * score_factor
        if settings.query_rank is None:
            self.q_proj = nn.Linear(hidden_size, num_heads * key_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, settings.query_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(settings.query_rank, eps=_EPS)
            self.q_b_proj = nn.Linear(settings.query_rank, num_heads * key_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(
            hidden_size, settings.rank + settings.rotary_size, bias=bias
        )
        self.kv_a_layernorm = RMSNorm(settings.rank, eps=_EPS)
        self.kv_b_proj = nn.Linear(
            settings.rank, num_heads * (settings.plain_size + settings.value_size), bias=False
        )
        self.o_proj = nn.Linear(num_heads * settings.value_size, hidden_size, bias=bias)

    def forward(self, x_BTD: Tensor, shared: AttentionInputs) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        sizes = self.settings
        if sizes.query_rank is None:
            q_BTX = self.q_proj(x_BTD)
        else:
            q_BTX = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        key_size = sizes.plain_size + sizes.rotary_size
        q_BNTX = q_BTX.unflatten(-1, (-1, key_size)).transpose(1, 2)
        q_BNTP, q_BNTR = q_BNTX.split((sizes.plain_size, sizes.rotary_size), dim=-1)
        down_BTX = self.kv_a_proj_with_mqa(x_BTD)
        latent_BTL, k_BTR = down_BTX.split((sizes.rank, sizes.rotary_size), dim=-1)
        latent_B1TL = self.kv_a_layernorm(latent_BTL)[:, None]
        k_B1TR = self._turn(k_BTR[:, None], shared)
        if shared.cache is not None:
            latent_B1TL, k_B1TR = shared.cache.append(self.layer, latent_B1TL, k_B1TR)
        up_BSX = self.kv_b_proj(latent_B1TL[:, 0])
        up_BNSX = up_BSX.unflatten(-1, (-1, sizes.plain_size + sizes.value_size)).transpose(1, 2)
        k_BNSP, v_BNSV = up_BNSX.split((sizes.plain_size, sizes.value_size), dim=-1)
        k_BNSR = k_B1TR.expand(-1, k_BNSP.shape[1], -1, -1)
        attended_BNTV = attend(
            torch.cat((q_BNTP, self._turn(q_BNTR, shared)), dim=-1),
            torch.cat((k_BNSP, k_BNSR), dim=-1),
            v_BNSV,
            mask_B1TS=shared.mask_B1TS,
            scale=self.scale,
        )
        return self.o_proj(attended_BNTV.transpose(1, 2).flatten(2))

    def _turn(self, x_BNTR: Tensor, shared: AttentionInputs) -> Tensor:
        return shared.turn(deinterleave(x_BNTR) if self.settings.interleaved else x_BNTR)
