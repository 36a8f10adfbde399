"""OLMo 2: norms behind attention and feed-forward, queries and keys normalized as a whole.

[OLMo team 2024, arXiv:2501.00656, section 3.3.]
"""

from collections.abc import Mapping
from typing import Any

from plait.models.decoder_config import DecoderConfig
from plait.models.family import COMMON_KEYS, Family, parse_common, unparse_common


def _parse(settings: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        family="olmo2",
        norm_placement="after",
        qk_norm=True,
        qk_norm_span="all_heads",
        **{**parse_common(settings), "norm_eps": settings.get("rms_norm_eps", 1e-5)},
    )


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    return {k: v for k, v in unparse_common(config).items() if k != "head_dim"}


FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    title="OLMo 2",
    features="norms behind each sublayer, queries and keys normalized across heads",
    own_keys=COMMON_KEYS - {"head_dim"},
    parse=_parse,
    unparse=_unparse,
)
