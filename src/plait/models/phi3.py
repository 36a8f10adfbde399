"""Phi-3 and Phi-4: fused projections, rotations stretched pair by pair [arXiv:2404.14219]."""

from collections.abc import Mapping
from typing import Any

from plait.models.decoder_config import DecoderConfig
from plait.models.family import COMMON_KEYS, Family, parse_common, unparse_common


def _parse(settings: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        family="phi3",
        fused_attention=True,
        feed_forward="gated_fused",
        sliding_window=settings.get("sliding_window"),
        **parse_common(settings),
    )


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    left_out = ("attention_bias", "head_dim")
    common = {k: v for k, v in unparse_common(config).items() if k not in left_out}
    return {
        **common,
        "sliding_window": config.sliding_window,
        "partial_rotary_factor": config.rope.fraction,
        "original_max_position_embeddings": config.rope.original_max_positions,
    }


FAMILY = Family(
    name="phi3",
    architecture="Phi3ForCausalLM",
    title="Phi-3, Phi-4",
    features="fused projections, LongRoPE, partial rotation",
    own_keys=COMMON_KEYS - {"attention_bias", "head_dim"}
    | {"sliding_window", "partial_rotary_factor", "original_max_position_embeddings"},
    parse=_parse,
    unparse=_unparse,
)
