"""Gemma 2 and 3: norms on both sides, local and global layers in turn.

[Gemma 2: arXiv:2408.00118; Gemma 3: arXiv:2503.19786.] Gemma 2 bounds scores and logits by a tanh;
Gemma 3 normalizes queries and keys instead, and its local layers have a rotation of their own.
"""

from collections.abc import Mapping
from typing import Any

from plait.models.decoder_config import DecoderConfig
from plait.models.family import (
    COMMON_KEYS,
    LAYER_TYPES,
    Family,
    parse_activation,
    parse_common,
    parse_full_layers,
    unparse_activation,
    unparse_common,
    unparse_layer_types,
)
from plait.models.rope_settings import parse_rope, unparse_rope

_KEYS = COMMON_KEYS | {
    "hidden_activation",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "sliding_window",
    "layer_types",
}
_FULL, _LOCAL = LAYER_TYPES


def _parse_2(settings: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(family="gemma2", **_shared(settings, period=2, caps=(50.0, 30.0)))


def _unparse_2(config: DecoderConfig) -> dict[str, Any]:
    return _write_shared(config)


def _parse_3(settings: Mapping[str, Any]) -> DecoderConfig:
    nested = settings.get("rope_parameters") or {}
    if _FULL in nested or _LOCAL in nested:
        ropes = [nested.get(_FULL) or {}, nested.get(_LOCAL) or {}]
    else:
        ropes = [settings.get("rope_scaling") or nested, {}]
    local_theta = settings.get("rope_local_base_freq") or 10_000.0
    bare = {k: v for k, v in settings.items() if k != "rope_theta"}
    shared = _shared(
        {k: v for k, v in settings.items() if k != "rope_parameters"},
        period=settings.get("sliding_window_pattern") or 6,
        caps=(None, None),
    )
    shared["rope"] = parse_rope(settings, given=ropes[0], theta=1_000_000.0)
    local = parse_rope(bare, given=ropes[1], theta=local_theta)
    return DecoderConfig(family="gemma3_text", qk_norm=True, local_rope=local, **shared)


def _unparse_3(config: DecoderConfig) -> dict[str, Any]:
    if config.local_rope is None:
        return _write_shared(config)
    written = _write_shared(config)
    del written["rope_theta"], written["rope_scaling"]
    ropes = {_FULL: config.rope, _LOCAL: config.local_rope}
    return written | {
        "rope_parameters": {
            kind: {"rope_theta": rope.theta} | (unparse_rope(rope) or {"rope_type": "default"})
            for kind, rope in ropes.items()
        }
    }


def _shared(
    settings: Mapping[str, Any], *, period: int, caps: tuple[float | None, float | None]
) -> dict[str, Any]:
    num_layers = settings["num_hidden_layers"]
    kinds = settings.get("layer_types") or [
        _LOCAL if (i + 1) % period else _FULL for i in range(num_layers)
    ]
    name = settings.get("hidden_activation") or "gelu_pytorch_tanh"
    common = parse_common({k: v for k, v in settings.items() if k != "hidden_act"})
    return common | {
        "norm": "rms_plus_one",
        "norm_placement": "both",
        "activation": parse_activation(name),
        "scale_embeddings": True,
        "head_size": settings.get("head_dim") or 256,
        "tie_embeddings": settings.get("tie_word_embeddings", True),
        "query_scalar": float(settings.get("query_pre_attn_scalar", 256)),
        "attention_soft_cap": settings.get("attn_logit_softcapping", caps[0]),
        "logit_soft_cap": settings.get("final_logit_softcapping", caps[1]),
        "sliding_window": settings.get("sliding_window", 4096),
        "full_layers": parse_full_layers(kinds),
    }


def _write_shared(config: DecoderConfig) -> dict[str, Any]:
    scalar = config.query_scalar or config.head_size
    common = {k: v for k, v in unparse_common(config).items() if k != "hidden_act"}
    return common | {
        "hidden_activation": unparse_activation(config.activation),
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.logit_soft_cap,
        "sliding_window": config.sliding_window,
        "layer_types": unparse_layer_types(config),
    }


GEMMA_2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    title="Gemma 2",
    features="soft caps, norms on both sides, local and global layers",
    own_keys=_KEYS,
    parse=_parse_2,
    unparse=_unparse_2,
)
GEMMA_3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    title="Gemma 3 (text)",
    features="normalized queries and keys, two rotations, local and global layers",
    own_keys=_KEYS | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
    parse=_parse_3,
    unparse=_unparse_3,
)
