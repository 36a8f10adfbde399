"""The shape of a decoder: every switch by which families differ, checked when it is made."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from plait.errors import ModelError
from plait.nn.attention import QKNormSpan
from plait.nn.experts import ExpertSettings
from plait.nn.feed_forward import Activation, FeedForwardKind
from plait.nn.latent_attention import LatentSettings
from plait.nn.norm import NormKind
from plait.nn.rotary import Rope
from plait.ops.numerics import Numerics

NormPlacement = Literal["before", "after", "both"]
Positions = Literal["rotary", "learned"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Shape of a decoder. `family` is the name under which `registry.py` knows it.

    norm_placement: of the norms around attention and feed-forward. attention_bias: of queries, keys
    and values; output_bias: of the projection behind them. query_scalar: the scores are divided by
    its root, None = head_size. soft caps: cap * tanh(x / cap) on scores and logits.
    sliding_window: how many tokens back a token sees, itself included, except in `full_layers`.
    local_rope: of the layers with a window, if theirs differs. plain_layers: have no rotation.
    scale_embeddings: multiply embeddings by the root of hidden_size.
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
    norm: NormKind = "rms"
    norm_placement: NormPlacement = "before"
    qk_norm_span: QKNormSpan = "head"
    output_bias: bool = False
    fused_attention: bool = False
    query_scalar: float | None = None
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()
    positions: Positions = "rotary"
    local_rope: Rope | None = None
    plain_layers: tuple[int, ...] = ()
    activation: Activation = "silu"
    feed_forward: FeedForwardKind = "gated"
    scale_embeddings: bool = False
    experts: ExpertSettings | None = None
    latent: LatentSettings | None = None

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
        if self.head_size % 2 and self.positions == "rotary":
            raise ModelError(f"head_size={self.head_size} is odd; rotary positions need pairs.")
        self._check_bounds()
        if self.numerics == "strict":
            self._check_strict()

    def _check_bounds(self) -> None:
        for name in (
            "query_scalar",
            "attention_soft_cap",
            "logit_soft_cap",
            "sliding_window",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ModelError(f"{name} must be positive or None, got {value}.")
        for name in ("full_layers", "plain_layers"):
            self._check_layers(name, getattr(self, name))
        if self.experts is not None:
            self._check_layers("experts.dense_layers", self.experts.dense_layers)
        if self.sliding_window is None and self.full_layers:
            raise ModelError("full_layers is meant for models with a sliding_window.")

    def _check_layers(self, name: str, layers: Iterable[int]) -> None:
        if wrong := [layer for layer in layers if not 0 <= layer < self.num_layers]:
            raise ModelError(f"{name} names {wrong}; the layers are 0..{self.num_layers - 1}.")

    def _check_strict(self) -> None:
        """Strict kernels exist for what Llama and Qwen3 are made of."""
        refused = {
            "norm": self.norm != "rms",
            "norm_placement": self.norm_placement != "before",
            "qk_norm_span": self.qk_norm_span != "head",
            "fused_attention": self.fused_attention,
            "attention_soft_cap": self.attention_soft_cap is not None,
            "logit_soft_cap": self.logit_soft_cap is not None,
            "sliding_window": self.sliding_window is not None,
            "positions": self.positions != "rotary",
            "plain_layers": bool(self.plain_layers),
            "activation": self.activation != "silu",
            "feed_forward": self.feed_forward != "gated",
            "experts": self.experts is not None,
            "latent": self.latent is not None,
        }
        if names := [name for name, is_set in refused.items() if is_set]:
            raise ModelError(
                f"strict numerics do not know this {', '.join(names)} yet. "
                "Use numerics=fast for this model."
            )

    def has_window(self, layer: int) -> bool:
        """Say whether a layer sees `sliding_window` tokens only."""
        return self.sliding_window is not None and layer not in self.full_layers

    def has_experts(self, layer: int) -> bool:
        """Say whether a layer has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers
