"""Qwen2 and 2.5, dense: biases on queries, keys and values [Yang et al. 2024, arXiv:2407.10671]."""

from collections.abc import Mapping
from typing import Any

from plait.models.decoder_config import DecoderConfig
from plait.models.family import (
    COMMON_KEYS,
    Family,
    parse_common,
    parse_full_layers,
    unparse_common,
    unparse_layer_types,
)


def _parse(settings: Mapping[str, Any]) -> DecoderConfig:
    common = {**parse_common(settings), "attention_bias": True, "output_bias": False}
    window = settings.get("sliding_window", 4096) if settings.get("use_sliding_window") else None
    full: tuple[int, ...] = ()
    if window is not None:
        first = settings.get("max_window_layers", 28)
        num_layers = common["num_layers"]
        kinds = settings.get("layer_types")
        full = parse_full_layers(kinds) if kinds else tuple(range(min(first, num_layers)))
    return DecoderConfig(family="qwen2", sliding_window=window, full_layers=full, **common)


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    has_window = config.sliding_window is not None
    common = {k: v for k, v in unparse_common(config).items() if k != "attention_bias"}
    return {
        **common,
        "use_sliding_window": has_window,
        "sliding_window": config.sliding_window,
        "layer_types": unparse_layer_types(config),
    }


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    title="Qwen2, Qwen2.5",
    features="biases on queries, keys and values",
    own_keys=COMMON_KEYS - {"attention_bias"}
    | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    parse=_parse,
    unparse=_unparse,
)
