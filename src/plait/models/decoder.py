"""The decoder: one class that trains and infers, for every family made of the same blocks.

    hidden = model(tokens)                      # training, scoring
    hidden = model(tokens, cache=cache)         # inference: the same class, the same numbers
    logits = model.logits(hidden)

Families (`llama.py`, `qwen3.py`, ...) only say how a `DecoderConfig` is read from a `config.json`.
Parameter names are those of Hugging Face checkpoints without their leading "model.".
"""

# Shapes: B batch, T tokens, D model width, V vocabulary.

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from plait.errors import ModelError
from plait.nn.attention import Attention, AttentionInputs, attention_mask
from plait.nn.feed_forward import FeedForward
from plait.nn.kv_cache import KVCache
from plait.nn.linear import make_linear
from plait.nn.norm import RMSNorm
from plait.nn.rotary import Rope, rotation_tables
from plait.nn.token_layout import TokenLayout
from plait.ops.linear_cross_entropy import linear_cross_entropy
from plait.ops.numerics import Numerics


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a decoder. `family` is the name under which `registry.py` knows it.

    numerics: "strict" makes the hidden states and logits of a token, and the gradients of a layer's
    inputs, independent of how tokens are batched, cut into chunks or cached, bit for bit.
    """

    family: str = "llama"
    vocab_size: int = 32_000
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_size: int = 128
    max_positions: int = 4096
    norm_eps: float = 1e-5
    rope: Rope = field(default_factory=Rope)
    tie_embeddings: bool = False
    attention_bias: bool = False
    feed_forward_bias: bool = False
    qk_norm: bool = False
    init_std: float = 0.02
    numerics: Numerics = "fast"

    def __post_init__(self) -> None:
        """Check what would otherwise fail deep inside."""
        for name in [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_size",
            "max_positions",
        ]:
            if getattr(self, name) < 1:
                raise ModelError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.norm_eps <= 0 or self.init_std < 0:
            raise ModelError(
                "norm_eps must be positive and init_std not negative, "
                f"got {self.norm_eps} and {self.init_std}."
            )
        if self.num_heads % self.num_kv_heads:
            legal = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ModelError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}. "
                f"Choose num_kv_heads from {', '.join(map(str, legal))}."
            )
        if self.head_size % 2:
            raise ModelError(f"head_size={self.head_size} is odd; rotary positions need pairs.")


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        """Make layer number `layer`, counted from 0."""
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            bias=config.attention_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
            layer=layer,
            numerics=config.numerics,
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = FeedForward(
            config.hidden_size,
            config.intermediate_size,
            bias=config.feed_forward_bias,
            numerics=config.numerics,
        )

    def forward(self, x_BTD: Tensor, shared: AttentionInputs) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), shared)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Decoder(nn.Module):
    """A causal language model."""

    def __init__(self, config: DecoderConfig) -> None:
        """Make the modules; `initialize` draws their values."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.layers = cast("Sequence[DecoderLayer]", layers)  # a ModuleList forgets its items' type
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = make_linear(
            config.hidden_size, config.vocab_size, bias=False, numerics=config.numerics
        )
        self.tie()

    def tie(self) -> None:
        """Let input and output embedding be one parameter, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, tokens: Tensor, layout: TokenLayout | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Compute normalized hidden states (B, T, D) of int64 tokens (B, T).

        With a cache the tokens follow those in it, and it grows by them. Raises ModelError if they
        are more than the model has positions or the cache has room.
        """
        shared = self._share(tokens, layout or TokenLayout(), cache)
        x_BTD = self.embed_tokens(tokens)
        for layer in self.layers:
            x_BTD = layer(x_BTD, shared)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scores of the next token, (..., V)."""
        return self.lm_head(hidden_BTD)

    def loss(
        self, hidden_BTD: Tensor, targets_BT: Tensor, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Sum the cross-entropies of `logits` [nats], without ever holding all of them.

        Targets below 0 are left out; products run in `dtype` (default: that of the hidden states).
        """
        hidden_MD, targets_M = hidden_BTD.flatten(0, -2), targets_BT.flatten()
        return linear_cross_entropy(hidden_MD, self.lm_head.weight, targets_M, dtype=dtype)

    def make_cache(
        self, *, batch_size: int, capacity: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        """Make an empty cache for rows of up to `capacity` tokens; dtype default: the weights'."""
        weight = self.embed_tokens.weight
        return KVCache(
            num_layers=self.config.num_layers,
            batch_size=batch_size,
            num_kv_heads=self.config.num_kv_heads,
            head_size=self.config.head_size,
            capacity=capacity,
            dtype=dtype or weight.dtype,
            device=weight.device,
        )

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: normal of `init_std`, smaller with depth into the residual.

        The scaling by 1/sqrt(2 * num_layers) is that of GPT-2 [Radford et al. 2019, section 2.3].
        """
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(
                    parameter, std=std / (2 * self.config.num_layers) ** 0.5, generator=generator
                )
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=std, generator=generator)
            else:
                nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)

    def _share(
        self, tokens_BT: Tensor, layout: TokenLayout, cache: KVCache | None
    ) -> AttentionInputs:
        if cache is not None and layout.segments is not None:
            raise ModelError(
                "a layout with segments cannot be used with a cache; "
                "give each document its own row."
            )
        if self.config.numerics == "strict" and layout.segments is not None:
            raise ModelError(
                "a model of strict numerics takes no layout with segments yet; "
                "give each document its own row."
            )
        num_tokens = tokens_BT.shape[1]
        num_before = 0 if cache is None else cache.length
        positions_BT = layout.positions
        if positions_BT is None:
            end = num_before + num_tokens
            if end > self.config.max_positions:
                raise ModelError(
                    f"{end} tokens are more than the model's limit of "
                    f"{self.config.max_positions} positions. "
                    "Shorten the sequence, or use a model with a larger max_positions."
                )
            positions_BT = torch.arange(num_before, end, device=tokens_BT.device)[None]
        cos_B1TH, sin_B1TH = rotation_tables(self.config.rope, positions_BT, self.config.head_size)
        if self.config.numerics == "strict":
            return AttentionInputs(cos_B1TH, sin_B1TH, None, cache)
        mask = attention_mask(
            num_tokens=num_tokens,
            num_held=num_before + num_tokens,
            segments_BT=layout.segments,
            device=tokens_BT.device,
        )
        return AttentionInputs(cos_B1TH, sin_B1TH, mask, cache)
