"""DeepSeek-V2 and V3: latent attention, shared and routed experts.

[V2: arXiv:2405.04434; V3: arXiv:2412.19437.] V3 chooses experts by sigmoids with a learnt bias, in
groups. The extra layers with which V3 predicts further tokens ahead are not read.
"""

from collections.abc import Mapping
from typing import Any

from plait.errors import ModelError, nearest_name
from plait.models.decoder_config import DecoderConfig
from plait.models.family import COMMON_KEYS, Family, parse_common, unparse_common
from plait.nn.experts import ExpertSettings
from plait.nn.latent_attention import LatentSettings

_KEYS = COMMON_KEYS | {
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "qk_head_dim",
    "v_head_dim",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_layer_freq",
    "first_k_dense_replace",
    "n_group",
    "topk_group",
    "topk_method",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "aux_loss_alpha",
    "seq_aux",
    "ep_size",
}
_METHODS_2 = ("greedy", "group_limited_greedy")


def _parse_2(settings: Mapping[str, Any]) -> DecoderConfig:
    method = settings.get("topk_method", "greedy")
    if method not in _METHODS_2:
        raise ModelError(f"topk_method={method!r}: {nearest_name(str(method), _METHODS_2)}")
    if settings.get("norm_topk_prob"):
        raise ModelError("norm_topk_prob=true is not supported for DeepSeek-V2.")
    in_groups = method == "group_limited_greedy"
    experts = _experts(settings, num_shared=2, in_groups=in_groups, router="softmax")
    return _config("deepseek_v2", settings, experts, interleaved=True)


def _parse_3(settings: Mapping[str, Any]) -> DecoderConfig:
    experts = _experts(settings, num_shared=1, in_groups=True, router="sigmoid")
    interleaved = settings.get("rope_interleave", True)
    return _config("deepseek_v3", settings, experts, interleaved=interleaved)


def _experts(settings: Mapping[str, Any], *, num_shared: int, in_groups: bool, router: Any):
    if settings.get("moe_layer_freq", 1) != 1:
        raise ModelError("moe_layer_freq must be 1: every layer behind the dense ones has experts.")
    inner = settings["moe_intermediate_size"]
    num_dense = settings.get("first_k_dense_replace", 0)
    return ExpertSettings(
        num_experts=settings["n_routed_experts"],
        experts_per_token=settings["num_experts_per_tok"],
        intermediate_size=inner,
        router=router,
        normalize=router == "sigmoid" and settings.get("norm_topk_prob", True),
        scale=float(settings.get("routed_scaling_factor", 1.0)),
        num_groups=settings["n_group"] if in_groups else 1,
        groups_per_token=settings["topk_group"] if in_groups else 1,
        router_float32=True,
        shared_intermediate_size=inner * (settings.get("n_shared_experts") or num_shared),
        dense_layers=tuple(range(min(num_dense, settings["num_hidden_layers"]))),
    )


def _config(
    family: str, settings: Mapping[str, Any], experts: ExpertSettings, *, interleaved: bool
) -> DecoderConfig:
    latent = LatentSettings(
        query_rank=settings.get("q_lora_rank"),
        rank=settings["kv_lora_rank"],
        plain_size=settings["qk_nope_head_dim"],
        rotary_size=settings["qk_rope_head_dim"],
        value_size=settings["v_head_dim"],
        interleaved=interleaved,
    )
    common = parse_common(settings)
    common |= {"head_size": latent.rotary_size, "num_kv_heads": common["num_heads"]}
    return DecoderConfig(family=family, experts=experts, latent=latent, **common)


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    experts, latent = config.experts, config.latent
    if experts is None or latent is None:
        raise ModelError(f"a {config.family} model needs experts and latent attention.")
    is_v3 = experts.router == "sigmoid"
    written = {
        **unparse_common(config),
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.rank,
        "qk_nope_head_dim": latent.plain_size,
        "qk_rope_head_dim": latent.rotary_size,
        "v_head_dim": latent.value_size,
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.shared_intermediate_size // experts.intermediate_size,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "first_k_dense_replace": len(experts.dense_layers),
        "routed_scaling_factor": experts.scale,
        "norm_topk_prob": experts.normalize,
        "n_group": experts.num_groups,
        "topk_group": experts.groups_per_token,
    }
    if is_v3:
        return written | {"rope_interleave": latent.interleaved, "num_nextn_predict_layers": 0}
    return written | {"topk_method": _METHODS_2[experts.num_groups > 1]}


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    title="DeepSeek-V2",
    features="latent attention, shared experts, softmax router",
    own_keys=_KEYS | {"mlp_bias"},
    parse=_parse_2,
    unparse=_unparse,
)
DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    title="DeepSeek-V3",
    features="latent attention, shared experts, sigmoid router with groups",
    own_keys=_KEYS | {"rope_interleave", "num_nextn_predict_layers"},
    parse=_parse_3,
    unparse=_unparse,
)
