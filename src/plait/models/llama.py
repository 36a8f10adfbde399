"""Llama 2, 3, 3.1 [Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, 2407.21783]."""

from collections.abc import Mapping
from typing import Any

from plait.models.decoder_config import DecoderConfig
from plait.models.family import COMMON_KEYS, Family, parse_common, unparse_common


def _parse(settings: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        family="llama", feed_forward_bias=settings.get("mlp_bias", False), **parse_common(settings)
    )


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    return {**unparse_common(config), "mlp_bias": config.feed_forward_bias}


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    title="Llama 2, 3, 3.1",
    features="grouped queries, stretched rotary positions",
    own_keys=COMMON_KEYS | {"mlp_bias"},
    parse=_parse,
    unparse=_unparse,
)
