"""Mistral: Llama with a sliding window [Jiang et al. 2023, arXiv:2310.06825]."""

from collections.abc import Mapping
from typing import Any

from plait.models.decoder_config import DecoderConfig
from plait.models.family import COMMON_KEYS, Family, parse_common, unparse_common


def _parse(settings: Mapping[str, Any]) -> DecoderConfig:
    # What transformers assumes where a config.json does not say: a window of 4,096.
    window = settings.get("sliding_window", 4096)
    return DecoderConfig(family="mistral", sliding_window=window, **parse_common(settings))


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    common = {k: v for k, v in unparse_common(config).items() if k != "attention_bias"}
    return {**common, "sliding_window": config.sliding_window}


FAMILY = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    title="Mistral",
    features="sliding window",
    own_keys=COMMON_KEYS - {"attention_bias"} | {"sliding_window"},
    parse=_parse,
    unparse=_unparse,
)
