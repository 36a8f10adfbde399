"""Qwen3, dense: normalized queries and keys [Yang et al. 2025, arXiv:2505.09388]."""

from collections.abc import Mapping
from typing import Any

from plait.errors import ModelError
from plait.models.decoder import DecoderConfig
from plait.models.family import COMMON_KEYS, Family, parse_common, unparse_common


def _parse(settings: Mapping[str, Any]) -> DecoderConfig:
    if settings.get("use_sliding_window"):
        raise ModelError(
            "use_sliding_window=true is not supported for Qwen3; no published Qwen3 model sets it."
        )
    head_size = (
        settings.get("head_dim") or 128
    )  # the default of transformers' Qwen3Config, not a quotient
    return DecoderConfig(
        family="qwen3", qk_norm=True, **{**parse_common(settings), "head_size": head_size}
    )


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    return {**unparse_common(config), "use_sliding_window": False}


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    own_keys=COMMON_KEYS
    | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"},
    parse=_parse,
    unparse=_unparse,
)
