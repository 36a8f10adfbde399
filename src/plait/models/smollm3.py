"""SmolLM3: Llama with some layers that have no rotation [arXiv:2501.18795 on such layers]."""

from collections.abc import Mapping
from typing import Any

from plait.errors import ModelError
from plait.models.decoder_config import DecoderConfig
from plait.models.family import COMMON_KEYS, Family, parse_common, unparse_common


def _parse(settings: Mapping[str, Any]) -> DecoderConfig:
    if settings.get("use_sliding_window"):
        raise ModelError(
            "use_sliding_window=true is not supported for SmolLM3; the published model has none."
        )
    common = parse_common(settings, theta=2_000_000.0)
    num_layers = common["num_layers"]
    interval = settings.get("no_rope_layer_interval", 4)
    # A list of 1 (rotation) and 0 (none), in spite of its name.
    flags = settings.get("no_rope_layers") or [(i + 1) % interval for i in range(num_layers)]
    return DecoderConfig(
        family="smollm3",
        plain_layers=tuple(i for i, flag in enumerate(flags) if not flag),
        feed_forward_bias=settings.get("mlp_bias", False),
        **common | {"tie_embeddings": settings.get("tie_word_embeddings", True)},
    )


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    flags = [int(i not in config.plain_layers) for i in range(config.num_layers)]
    return {
        **unparse_common(config),
        "mlp_bias": config.feed_forward_bias,
        "no_rope_layers": flags,
        "use_sliding_window": False,
    }


FAMILY = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    title="SmolLM3",
    features="layers without rotation",
    own_keys=COMMON_KEYS
    | {"mlp_bias", "no_rope_layers", "no_rope_layer_interval", "layer_types"}
    | {"use_sliding_window", "sliding_window", "max_window_layers"},
    parse=_parse,
    unparse=_unparse,
)
