"""Mixtral: Mistral with experts [Jiang et al. 2024, arXiv:2401.04088]."""

from collections.abc import Mapping
from typing import Any

from plait.errors import ModelError
from plait.models.decoder_config import DecoderConfig
from plait.models.family import COMMON_KEYS, Family, parse_common, unparse_common
from plait.models.naming import Naming
from plait.nn.experts import ExpertSettings


def _parse(settings: Mapping[str, Any]) -> DecoderConfig:
    experts = ExpertSettings(
        num_experts=settings["num_local_experts"],
        experts_per_token=settings["num_experts_per_tok"],
        intermediate_size=settings["intermediate_size"],
    )
    common = {**parse_common(settings), "norm_eps": settings.get("rms_norm_eps", 1e-5)}
    return DecoderConfig(
        family="mixtral",
        experts=experts,
        sliding_window=settings.get("sliding_window"),
        **common,
    )


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    if (experts := config.experts) is None:
        raise ModelError("a mixtral model needs experts.")
    common = {k: v for k, v in unparse_common(config).items() if k != "attention_bias"}
    return {
        **common,
        "intermediate_size": experts.intermediate_size,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "sliding_window": config.sliding_window,
    }


FAMILY = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    title="Mixtral",
    features="experts in every layer",
    own_keys=COMMON_KEYS - {"attention_bias"}
    | {"num_local_experts", "num_experts_per_tok", "sliding_window", "router_aux_loss_coef"},
    parse=_parse,
    unparse=_unparse,
    naming=Naming(
        words=(
            (".mlp.", ".block_sparse_moe."),
            (".gate_proj.", ".w1."),
            (".down_proj.", ".w2."),
            (".up_proj.", ".w3."),
        )
    ),
)
