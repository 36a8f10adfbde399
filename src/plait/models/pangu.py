"""openPangu-Embedded: Llama with biases on all four projections of the attention.

From the published configuration of the 1B and 7B models; its code comes with the weights and is not
part of transformers.
"""

from collections.abc import Mapping
from typing import Any

from plait.models.decoder_config import DecoderConfig
from plait.models.family import COMMON_KEYS, Family, parse_common, unparse_common


def _parse(settings: Mapping[str, Any]) -> DecoderConfig:
    bias = settings.get("bias", True)
    common = parse_common(settings, theta=16_000_000.0)
    common |= {"attention_bias": bias, "output_bias": bias}
    common["norm_eps"] = settings.get("rms_norm_eps", 1e-5)
    return DecoderConfig(family="PanguEmbedded", **common)


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    common = {k: v for k, v in unparse_common(config).items() if k != "attention_bias"}
    return {**common, "bias": config.attention_bias}


FAMILY = Family(
    name="PanguEmbedded",
    architecture="PanguEmbeddedForCausalLM",
    title="openPangu-Embedded",
    features="biases around the attention",
    own_keys=COMMON_KEYS - {"attention_bias"} | {"bias"},
    parse=_parse,
    unparse=_unparse,
    is_in_transformers=False,
)
