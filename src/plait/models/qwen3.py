"""Qwen3, dense or with experts: normalized queries and keys [Yang et al. 2025, 2505.09388]."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plait.errors import ModelError
from plait.models.decoder_config import DecoderConfig
from plait.models.family import COMMON_KEYS, Family, parse_common, unparse_common
from plait.nn.experts import ExpertSettings

_HEAD_SIZE = 128  # the default of transformers' Qwen3Config, not a quotient
_KEYS = COMMON_KEYS | {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}


def _parse(settings: Mapping[str, Any]) -> DecoderConfig:
    _refuse_window(settings)
    head_size = settings.get("head_dim") or _HEAD_SIZE
    common = {**parse_common(settings), "head_size": head_size}
    return DecoderConfig(family="qwen3", qk_norm=True, **common)


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    return {**unparse_common(config), "use_sliding_window": False}


def _parse_with_experts(settings: Mapping[str, Any]) -> DecoderConfig:
    _refuse_window(settings)
    step = settings.get("decoder_sparse_step", 1)
    dense = set(settings.get("mlp_only_layers") or ())
    dense |= {i for i in range(settings["num_hidden_layers"]) if (i + 1) % step}
    experts = ExpertSettings(
        num_experts=settings.get("num_experts") or settings["num_local_experts"],
        experts_per_token=settings["num_experts_per_tok"],
        intermediate_size=settings["moe_intermediate_size"],
        normalize=settings.get("norm_topk_prob", False),
        dense_layers=tuple(sorted(dense)),
    )
    return DecoderConfig(
        family="qwen3_moe", qk_norm=True, experts=experts, **parse_common(settings)
    )


def _unparse_with_experts(config: DecoderConfig) -> dict[str, Any]:
    if (experts := config.experts) is None:
        raise ModelError("a qwen3_moe model needs experts.")
    return {
        **unparse_common(config),
        "use_sliding_window": False,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(experts.dense_layers),
    }


def _refuse_window(settings: Mapping[str, Any]) -> None:
    if settings.get("use_sliding_window"):
        raise ModelError(
            "use_sliding_window=true is not supported for Qwen3; no published Qwen3 model sets it."
        )


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    title="Qwen3",
    features="normalized queries and keys",
    own_keys=_KEYS,
    parse=_parse,
    unparse=_unparse,
)
WITH_EXPERTS = replace(
    FAMILY,
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    title="Qwen3-MoE",
    features="the same with experts",
    own_keys=_KEYS
    | {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"}
    | {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef"},
    parse=_parse_with_experts,
    unparse=_unparse_with_experts,
)
