"""The decoder: one class that trains and infers, for every family made of the same blocks.

    hidden = model(tokens)                      # training, scoring
    hidden = model(tokens, cache=cache)         # inference: the same class, the same numbers
    logits = model.logits(hidden)

Families (`llama.py`, `gemma.py`, ...) only say how a `DecoderConfig` is read from a `config.json`.
Parameter names are those of most Hugging Face checkpoints without their leading "model.".
"""

# Shapes: B batch, T tokens, D model width, V vocabulary.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from plait.errors import ModelError
from plait.models.decoder_config import DecoderConfig as DecoderConfig
from plait.nn.attention import Attention, AttentionInputs, AttentionSettings, attention_mask
from plait.nn.experts import ExpertFeedForward
from plait.nn.feed_forward import FeedForward
from plait.nn.kv_cache import KVCache
from plait.nn.latent_attention import LatentAttention
from plait.nn.linear import make_linear
from plait.nn.norm import make_norm
from plait.nn.rotary import Rope, rotation_tables
from plait.nn.token_layout import TokenLayout
from plait.ops.linear_cross_entropy import linear_cross_entropy


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each beside a residual, with norms before, after or around."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        """Make layer number `layer`, counted from 0."""
        super().__init__()
        self.norm_placement = config.norm_placement
        self.self_attn = _make_attention(config, layer)
        self.mlp = _make_feed_forward(config, layer)
        # Checkpoints of each placement have names of their own.
        if self.norm_placement != "after":
            self.input_layernorm = _norm(config)
        self.post_attention_layernorm = _norm(config)
        if self.norm_placement == "both":
            self.pre_feedforward_layernorm = _norm(config)
        if self.norm_placement != "before":
            self.post_feedforward_layernorm = _norm(config)

    def forward(self, x_BTD: Tensor, shared: AttentionInputs) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        if self.norm_placement == "before":
            x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), shared)
            return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        if self.norm_placement == "after":
            x_BTD = x_BTD + self.post_attention_layernorm(self.self_attn(x_BTD, shared))
            return x_BTD + self.post_feedforward_layernorm(self.mlp(x_BTD))
        attended_BTD = self.self_attn(self.input_layernorm(x_BTD), shared)
        x_BTD = x_BTD + self.post_attention_layernorm(attended_BTD)
        fed_BTD = self.mlp(self.pre_feedforward_layernorm(x_BTD))
        return x_BTD + self.post_feedforward_layernorm(fed_BTD)


@dataclass(frozen=True)
class _LayerKind:
    """What decides which `AttentionInputs` a layer takes."""

    rope: Rope | None
    window: int | None


class Decoder(nn.Module):
    """A causal language model."""

    def __init__(self, config: DecoderConfig) -> None:
        """Make the modules; `initialize` draws their values."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.layers = cast("Sequence[DecoderLayer]", layers)  # a ModuleList forgets its items' type
        kinds = [_kind(config, layer) for layer in range(config.num_layers)]
        self._kinds = list(dict.fromkeys(kinds))
        self._kind_numbers = [self._kinds.index(kind) for kind in kinds]
        self.norm = _norm(config)
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
        layout = layout or TokenLayout()
        self._check(layout, cache)
        positions_BT = self._positions(tokens, layout, cache)
        x_BTD = self._embed(tokens, positions_BT)
        shared = [self._share(kind, tokens, positions_BT, layout, cache) for kind in self._kinds]
        for layer, number in zip(self.layers, self._kind_numbers, strict=True):
            x_BTD = layer(x_BTD, shared[number])
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(x_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scores of the next token, (..., V)."""
        logits_BTV = self.lm_head(hidden_BTD)
        if (cap := self.config.logit_soft_cap) is not None:
            return torch.tanh(logits_BTV / cap) * cap
        return logits_BTV

    def loss(
        self, hidden_BTD: Tensor, targets_BT: Tensor, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Sum the cross-entropies of `logits` [nats], holding 2^25 of them at most.

        Targets below 0 are left out; products run in `dtype` (default: that of the hidden states).
        """
        return linear_cross_entropy(
            hidden_BTD.flatten(0, -2),
            self.lm_head.weight,
            targets_BT.flatten(),
            dtype=dtype,
            soft_cap=self.config.logit_soft_cap,
            numerics=self.config.numerics,
        )

    def make_cache(
        self, *, batch_size: int, capacity: int, dtype: torch.dtype | None = None
    ) -> KVCache:
        """Make an empty cache for rows of up to `capacity` tokens; dtype default: the weights'.

        Latent attention caches its latent vectors, in place of keys and values.
        """
        weight = self.embed_tokens.weight
        latent = self.config.latent
        return KVCache(
            num_layers=self.config.num_layers,
            batch_size=batch_size,
            num_kv_heads=1 if latent else self.config.num_kv_heads,
            head_size=latent.rank if latent else self.config.head_size,
            value_size=latent.rotary_size if latent else None,
            capacity=capacity,
            dtype=dtype or weight.dtype,
            device=weight.device,
        )

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh weights: normal of `init_std`, smaller with depth into the residual.

        The scaling by 1/sqrt(2 * num_layers) is that of GPT-2 [Radford et al. 2019, section 2.3].
        """
        std = self.config.init_std
        plain_norm = 0.0 if self.config.norm == "rms_plus_one" else 1.0
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                nn.init.normal_(
                    parameter, std=std / (2 * self.config.num_layers) ** 0.5, generator=generator
                )
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.constant_(parameter, plain_norm)

    def _check(self, layout: TokenLayout, cache: KVCache | None) -> None:
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

    def _positions(self, tokens_BT: Tensor, layout: TokenLayout, cache: KVCache | None) -> Tensor:
        if layout.positions is not None:
            return layout.positions
        start = 0 if cache is None else cache.length
        end = start + tokens_BT.shape[1]
        if end > self.config.max_positions:
            raise ModelError(
                f"{end} tokens are more than the model's limit of "
                f"{self.config.max_positions} positions. "
                "Shorten the sequence, or use a model with a larger max_positions."
            )
        return torch.arange(start, end, device=tokens_BT.device)[None]

    def _embed(self, tokens_BT: Tensor, positions_BT: Tensor) -> Tensor:
        x_BTD = self.embed_tokens(tokens_BT)
        if self.config.scale_embeddings:
            # The factor is rounded to the dtype of the weights, as in the reference code.
            x_BTD = x_BTD * x_BTD.new_full((), self.config.hidden_size**0.5)
        if self.config.positions == "learned":
            x_BTD = x_BTD + self.embed_positions(positions_BT)
        return x_BTD

    def _share(
        self,
        kind: _LayerKind,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        layout: TokenLayout,
        cache: KVCache | None,
    ) -> AttentionInputs:
        num_tokens = tokens_BT.shape[1]
        num_held = num_tokens if cache is None else cache.length + num_tokens
        cos_B1TR = sin_B1TR = mask = None
        if kind.rope is not None:
            latent = self.config.latent
            size = latent.rotary_size if latent else self.config.head_size
            # A rotation must not change while a cache fills: its capacity decides, not its length.
            longest = num_tokens if cache is None else cache.capacity
            is_long = longest > kind.rope.original_max_positions
            cos_B1TR, sin_B1TR = rotation_tables(kind.rope, positions_BT, size, is_long=is_long)
        if self.config.numerics == "fast":
            mask = attention_mask(
                num_tokens=num_tokens,
                num_held=num_held,
                segments_BT=layout.segments,
                device=tokens_BT.device,
                window=kind.window,
            )
        return AttentionInputs(cos_B1TR, sin_B1TR, mask, cache)


def _kind(config: DecoderConfig, layer: int) -> _LayerKind:
    has_window = config.has_window(layer)
    rope = config.local_rope if has_window and config.local_rope is not None else config.rope
    if config.positions == "learned" or layer in config.plain_layers:
        rope = None
    return _LayerKind(rope, config.sliding_window if has_window else None)


def _norm(config: DecoderConfig) -> nn.Module:
    return make_norm(config.norm, config.hidden_size, eps=config.norm_eps)


def _make_attention(config: DecoderConfig, layer: int) -> Attention | LatentAttention:
    if config.latent is not None:
        return LatentAttention(
            config.latent,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            bias=config.attention_bias,
            score_factor=config.rope.score_factor(),
            layer=layer,
        )
    settings = AttentionSettings(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        bias=config.attention_bias,
        output_bias=config.output_bias,
        fused=config.fused_attention,
        qk_norm_eps=config.norm_eps if config.qk_norm else None,
        qk_norm_kind=config.norm,
        qk_norm_span=config.qk_norm_span,
        scale=(config.query_scalar or config.head_size) ** -0.5,
        soft_cap=config.attention_soft_cap,
        numerics=config.numerics,
    )
    return Attention(settings, layer=layer)


def _make_feed_forward(config: DecoderConfig, layer: int) -> FeedForward | ExpertFeedForward:
    if config.experts is not None and config.has_experts(layer):
        return ExpertFeedForward(config.hidden_size, config.experts)
    return FeedForward(
        config.hidden_size,
        config.intermediate_size,
        bias=config.feed_forward_bias,
        numerics=config.numerics,
        activation=config.activation,
        kind=config.feed_forward,
    )
