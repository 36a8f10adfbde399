"""The rules of each family of models: Plait's own, and those of transformers.

A Hugging Face model's `tp_plan` is read for the products of a layer; what it lacks (the tokens that
`sp` shares, fused layers, GPT-2) stands here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from plait.errors import PlanError
from plait.plan.parallel_plan import ParallelPlan
from plait.plan.rules import Rule, Rules, Style, owners, rule_of


@dataclass(frozen=True, kw_only=True)
class FamilyRules:
    """Rules by pattern ("*" stands for one part of a name), and the counts that tp must divide."""

    family: str
    rules: Rules
    counts: Mapping[str, int]


def rules_of_family(model: nn.Module, plan: ParallelPlan) -> FamilyRules | None:
    """Return the rules of the model's family, or None if there are none."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    if is_own(model):
        return _own_family(config)
    theirs = cast("Mapping[str, str]", getattr(config, "base_model_tp_plan", None) or {})
    family = str(getattr(config, "model_type", ""))
    if family not in FAMILIES and not theirs:
        return None
    if plan.sp and getattr(config, "output_router_logits", False):
        raise PlanError(
            "under sp=True a rank routes its own tokens only, and output_router_logits=True needs "
            "all of them. Set it to False, or use sp=False."
        )
    prefix = str(getattr(model, "base_model_prefix", ""))
    start = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    rules = dict(_translate(theirs, family))
    if family in FAMILIES:
        rules = {**rules, **FAMILIES[family](config)}
    elif not plan.sp:
        rules = {**_rest_whole(model, start, rules), **rules}
    table = {start + pattern: rule for pattern, rule in rules.items()}
    return FamilyRules(family=family, rules={**table, **_HEADS}, counts=_counts(config))


def is_own(model: nn.Module) -> bool:
    """Whether it is one of Plait's own models."""
    return type(model).__module__.startswith("plait.models.")


_HEADS: Rules = {"lm_head": Rule(Style.WHOLE), "score": Rule(Style.WHOLE)}
_BRANCH, _COLUMN, _ROW = Rule(Style.BRANCH), Rule(Style.COLUMN), Rule(Style.ROW)
_TOKENWISE, _HEADWISE = Rule(Style.TOKENWISE), Rule(Style.HEADWISE)

_DECODER: Rules = {
    "embed_tokens": Rule(Style.WHOLE),
    # Positions and masks are made from the embeddings' shape: tokens are shared after that.
    "layers.*": Rule(Style.LAYER),
    "layers.*.self_attn": _BRANCH,
    "layers.*.mlp": _BRANCH,
    "layers.*.input_layernorm": _TOKENWISE,
    "layers.*.post_attention_layernorm": _TOKENWISE,
    "norm": Rule(Style.TOKENWISE_GATHERED),
}
_PROJECTIONS: Rules = {
    **{f"layers.*.self_attn.{name}_proj": _COLUMN for name in "qkv"},
    "layers.*.self_attn.o_proj": _ROW,
    "layers.*.mlp.gate_proj": _COLUMN,
    "layers.*.mlp.up_proj": _COLUMN,
    "layers.*.mlp.down_proj": _ROW,
}
_HEAD_NORMS: Rules = {f"layers.*.self_attn.{name}_norm": _HEADWISE for name in "qk"}


def _decoder(_: object) -> Rules:
    """Llama, Mistral, Qwen3: their own plan says how the products are shared."""
    return _DECODER


def _gemma2(_: object) -> Rules:
    inner = [f"layers.*.{name}_feedforward_layernorm" for name in ("pre", "post")]
    return {**_DECODER, **dict.fromkeys(inner, _TOKENWISE)}


def _olmo2(_: object) -> Rules:
    """Queries and keys are normalized over all heads: their statistics are summed over ranks.

    (Its own plan gathers queries, keys and values instead.)
    """
    rules = {name: rule for name, rule in _DECODER.items() if "input_layernorm" not in name}
    norms = {f"layers.*.self_attn.{name}_norm": Rule(Style.WIDE_NORM) for name in "qk"}
    return {
        **rules,
        **_PROJECTIONS,
        **norms,
        "layers.*.post_feedforward_layernorm": _TOKENWISE,
    }


def _phi3(config: Any) -> Rules:
    """Fused projections, of which its own plan gathers the outputs."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    qkv = (heads * size, kv_heads * size, kv_heads * size)
    divided = ("num_key_value_heads", "config.num_attention_heads")
    return {
        **_DECODER,
        "layers.*.self_attn": Rule(Style.BRANCH, divided=divided),
        "layers.*.self_attn.qkv_proj": Rule(Style.COLUMN, sections=qkv),
        "layers.*.self_attn.o_proj": _ROW,
        "layers.*.mlp.gate_up_proj": Rule(Style.COLUMN, sections=(config.intermediate_size,) * 2),
        "layers.*.mlp.down_proj": _ROW,
    }


def _gpt2(config: Any) -> Rules:
    """GPT-2 has no plan of its own. Its layers are Conv1D: a Linear with the weight transposed."""
    if config.add_cross_attention:
        raise PlanError(
            "there are no rules for GPT-2 with cross-attention. "
            "Use add_cross_attention=False, or tp=1."
        )
    return {
        "wte": Rule(Style.WHOLE),
        "wpe": Rule(Style.WHOLE),
        "drop": Rule(Style.SPLIT_OUTPUT),
        "h.*.ln_1": _TOKENWISE,
        "h.*.attn": Rule(Style.BRANCH, divided=("num_heads", "split_size")),
        "h.*.attn.c_attn": Rule(Style.COLUMN, sections=(config.hidden_size,) * 3),
        "h.*.attn.c_proj": _ROW,
        "h.*.ln_2": _TOKENWISE,
        "h.*.mlp": _BRANCH,
        "h.*.mlp.c_fc": _COLUMN,
        "h.*.mlp.c_proj": _ROW,
        "ln_f": Rule(Style.TOKENWISE_GATHERED),
    }


def _mixtral(_: object) -> Rules:
    """The attention is shared; every rank holds all experts, under sp for its own tokens."""
    rules = {name: rule for name, rule in _DECODER.items() if name != "layers.*.mlp"}
    return {
        **rules,
        "layers.*.mlp.gate": _TOKENWISE,
        "layers.*.mlp.experts": _TOKENWISE,
    }


FAMILIES: Mapping[str, Callable[[Any], Rules]] = {
    "gemma2": _gemma2,
    "gpt2": _gpt2,
    "llama": _decoder,
    "mistral": _decoder,
    "mixtral": _mixtral,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen3": _decoder,
}

_STYLES_OF_HUGGING_FACE: Mapping[str, Style] = {
    "colwise": Style.COLUMN,
    "colwise_gather_output": Style.COLUMN_GATHERED,
    "colwise_rep": Style.COLUMN_GATHERED,
    "rowwise": Style.ROW,
    "replicated_with_grad_allreduce": Style.HEADWISE,
    "replicate": Style.WHOLE,
    "sequence_parallel": Style.TOKENWISE,
}

# Latent attention: the short vectors are everybody's, what is made of them is a rank's own heads.
_LATENT_WHOLE = ("q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm")
# Every rank holds all experts, under sp for its own tokens.
_OWN_EXPERTS: Rules = {
    "layers.*.mlp": Rule(Style.WHOLE),
    "layers.*.mlp.gate": _TOKENWISE,
    "layers.*.mlp.experts": _TOKENWISE,
    **{f"layers.*.mlp.shared_experts.{name}_proj": _TOKENWISE for name in ("gate", "up", "down")},
}
_HUGGING_FACE_COUNTS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def _own_family(config: Any) -> FamilyRules:
    """All of Plait's own families: a decoder is made of few kinds of modules."""
    # Here positions and masks are made from the tokens, so the embeddings can share them at once.
    rules = {name: rule for name, rule in _DECODER.items() if name != "layers.*"}
    embeddings = ("embed_tokens", "embed_positions")
    rules |= dict.fromkeys(embeddings, Rule(Style.SPLIT_OUTPUT))
    norms = [f"layers.*.{name}_feedforward_layernorm" for name in ("pre", "post")]
    rules |= dict.fromkeys(norms, _TOKENWISE)
    if config.qk_norm_span == "all_heads":
        rules |= dict.fromkeys(_HEAD_NORMS, Rule(Style.WIDE_NORM))
    else:
        rules |= _HEAD_NORMS
    heads, kv_heads = (n * config.head_size for n in (config.num_heads, config.num_kv_heads))
    fused = {
        "layers.*.self_attn.qkv_proj": Rule(Style.COLUMN, sections=(heads, kv_heads, kv_heads)),
        "layers.*.mlp.gate_up_proj": Rule(Style.COLUMN, sections=(config.intermediate_size,) * 2),
    }
    latent = {f"layers.*.self_attn.{name}": _HEADWISE for name in _LATENT_WHOLE} | {
        f"layers.*.self_attn.{name}": _COLUMN for name in ("q_b_proj", "kv_b_proj")
    }
    experts: dict[str, Rule] = {}
    for layer in filter(config.has_experts, range(config.num_layers)):
        experts |= {name.replace("*", str(layer)): rule for name, rule in _OWN_EXPERTS.items()}
    return FamilyRules(
        family=str(config.family),
        rules={**rules, **_PROJECTIONS, **fused, **latent, **experts, **_HEADS},
        counts=divided_counts(config),
    )


def divided_counts(config: Any) -> dict[str, int]:
    """What tp must divide, of the configuration of one of Plait's own models."""
    names = ["num_heads"]
    if config.latent is None:
        names.append("num_kv_heads")
    if not all(map(config.has_experts, range(config.num_layers))):
        names.append("intermediate_size")
    return {name: getattr(config, name) for name in names}


def _counts(config: Any) -> dict[str, int]:
    found = {name: getattr(config, name, None) for name in _HUGGING_FACE_COUNTS}
    return {name: count for name, count in found.items() if isinstance(count, int)}


def _translate(plan: Mapping[str, str], family: str) -> Iterator[tuple[str, Rule]]:
    """Read a plan of transformers; of our own families, what they replace may be unknown."""
    for pattern, style in plan.items():
        if style in _STYLES_OF_HUGGING_FACE:
            yield pattern, Rule(_STYLES_OF_HUGGING_FACE[style])
        elif family not in FAMILIES:
            raise PlanError(
                f"the tp_plan of this {family} model shares {pattern!r} in the style {style!r}, "
                f"which Plait does not have. Give rules={{{pattern!r}: style}} for every module "
                f"with parameters; styles: {', '.join(Style)}."
            )


def _rest_whole(model: nn.Module, start: str, rules: Rules) -> dict[str, Rule]:
    """What an unknown family's plan leaves out is whole, unless it stands beside shared products.

    There its gradients could be partial without anybody saying so; it stays without a rule.
    """
    names = [name.removeprefix(start) for name, _ in owners(model)]
    beside = {_parent(name) for name in names if rule_of(name, rules) is not None}
    return {name: Rule(Style.WHOLE) for name in names if _parent(name) not in beside}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
