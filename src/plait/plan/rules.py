"""Which part of each module a rank of the axis `tp` holds: a table of rules for each family.

Pure data: names of modules, no process group. `find_rules` looks up the family of a model, reads
the `tp_plan` of a Hugging Face model where that says enough, lets the user's own rules win, and
checks that every parameter has a rule and that the sizes can be shared. `graph/parallelize.py` does
to the model what the rules say.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

from torch import nn

from plait.errors import PlanError, nearest_name
from plait.plan.parallel_plan import ParallelPlan


class Style(StrEnum):
    """What a rank does of a module. "Own tokens": under `sp`, the rank's share of dim 1."""

    WHOLE = "whole"  # all of it
    COLUMN = "column"  # the rank's own output features
    COLUMN_GATHERED = "column_gathered"  # the same, then the outputs of all ranks side by side
    ROW = "row"  # the rank's own input features; outputs summed, under sp each its own tokens
    VOCABULARY = "vocabulary"  # an embedding's own rows; what the ranks find is summed
    VOCABULARY_SPLIT = "vocabulary_split"  # the same; own tokens go out
    TOKENWISE = "tokenwise"  # all of it, on own tokens; gradients summed
    TOKENWISE_GATHERED = "tokenwise_gathered"  # the same, then the tokens of all ranks
    HEADWISE = "headwise"  # all of it, on own heads; gradients summed
    WIDE_NORM = "wide_norm"  # an RMS norm over features of which each rank has its own
    BRANCH = "branch"  # attention or MLP: all tokens go in, for the COLUMN modules inside
    SPLIT_INPUT = "split_input"  # all tokens come, own tokens go in
    SPLIT_OUTPUT = "split_output"  # all of it, on all tokens; own tokens go out


@dataclass(frozen=True)
class Rule:
    """A style, and what it needs to know.

    sections: sizes of the parts that a fused layer puts side by side (queries, keys, values): a
    rank holds its own features of each. divided: names of attributes of the module that count what
    is shared ("num_heads"); "config.x" is changed in a copy of the module's config.
    """

    style: Style
    sections: tuple[int, ...] = ()
    divided: tuple[str, ...] = ()


Rules = Mapping[str, Rule]
GivenRules = Mapping[str, "Rule | Style | str"]


@dataclass(frozen=True, kw_only=True)
class FamilyRules:
    """Rules by pattern ("*" stands for one part of a name), and the counts that tp must divide."""

    family: str
    rules: Rules
    counts: Mapping[str, int]


def find_rules(
    model: nn.Module, plan: ParallelPlan, *, rules: GivenRules | None = None
) -> dict[str, Rule]:
    """Return the rule of each module of the model that has one, by the module's name.

    rules: the user's own, {pattern: style}; they win over the family's, and suffice for a model of
    unknown family if they name every module with parameters.

    Raises PlanError for a module with parameters but no rule, a pattern that matches nothing, and a
    tp that does not divide what it shares.
    """
    given = {pattern: as_rule(rule, pattern) for pattern, rule in (rules or {}).items()}
    family = family_rules(model, plan)
    if family is None and not given:
        raise PlanError(_unknown(model))
    usual = _match(model, family.rules) if family else {}
    found = {**usual, **_match(model, given)}
    for name, rule in usual.items():
        if rule.style is Style.SPLIT_OUTPUT and found[name].style is Style.VOCABULARY:
            found[name] = Rule(Style.VOCABULARY_SPLIT)
    _check_patterns(model, given)
    _check_complete(model, found)
    if family is not None:
        _check_counts(family, plan)
        _check_own_head(model, found)
    return found


def as_rule(rule: Rule | Style | str, pattern: str) -> Rule:
    """Make a rule of what a user gave. Raises PlanError for an unknown style."""
    if isinstance(rule, Rule):
        return rule
    try:
        return Rule(Style(rule))
    except ValueError:
        known = [style.value for style in Style]
        message = f"the rule for {pattern!r} names no style: {str(rule)!r}. "
        raise PlanError(message + nearest_name(str(rule), known)) from None


def family_rules(model: nn.Module, plan: ParallelPlan) -> FamilyRules | None:
    """Return the rules of the model's family, or None if there are none."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    if _is_own(model):
        return _own_family(config)
    theirs = cast("Mapping[str, str]", getattr(config, "base_model_tp_plan", None) or {})
    family = str(getattr(config, "model_type", ""))
    if family not in _FAMILIES and not theirs:
        return None
    prefix = str(getattr(model, "base_model_prefix", ""))
    start = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    rules = dict(_translate(theirs, family))
    if family in _FAMILIES:
        rules = {**rules, **_FAMILIES[family](config)}
    elif not plan.sp:
        rules = {**_rest_whole(model, start, rules), **rules}
    table = {start + pattern: rule for pattern, rule in rules.items()}
    return FamilyRules(
        family=family, rules={**table, **_HEADS}, counts=_counts(config, _HUGGING_FACE_COUNTS)
    )


def legal_sizes(counts: Mapping[str, int]) -> list[int]:
    """All values of tp that divide every count."""
    smallest = min(counts.values())
    return [n for n in range(1, smallest + 1) if all(c % n == 0 for c in counts.values())]


_HEADS: Rules = {"lm_head": Rule(Style.WHOLE), "score": Rule(Style.WHOLE)}
_BRANCH, _COLUMN, _ROW = Rule(Style.BRANCH), Rule(Style.COLUMN), Rule(Style.ROW)
_TOKENWISE, _HEADWISE = Rule(Style.TOKENWISE), Rule(Style.HEADWISE)

_DECODER: Rules = {
    "embed_tokens": Rule(Style.WHOLE),
    # Positions and masks are made from the embeddings' shape: tokens are shared after that.
    "layers.0": Rule(Style.SPLIT_INPUT),
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


_FAMILIES: Mapping[str, Callable[[Any], Rules]] = {
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

_OWN_COUNTS = {
    "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "intermediate_size": "intermediate_size",
}
_HUGGING_FACE_COUNTS = {
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
}


def _own_family(config: Any) -> FamilyRules:
    # Here positions and masks are made from the tokens, so the embedding can share them at once.
    rules = {name: rule for name, rule in _DECODER.items() if name != "layers.0"}
    rules["embed_tokens"] = Rule(Style.SPLIT_OUTPUT)
    return FamilyRules(
        family=str(config.family),
        rules={**rules, **_PROJECTIONS, **_HEAD_NORMS, **_HEADS},
        counts=_counts(config, _OWN_COUNTS),
    )


def _counts(config: Any, names: Mapping[str, str]) -> dict[str, int]:
    found = {name: getattr(config, attribute, None) for name, attribute in names.items()}
    return {name: count for name, count in found.items() if isinstance(count, int)}


def _translate(plan: Mapping[str, str], family: str) -> Iterator[tuple[str, Rule]]:
    """Read a plan of transformers; of our own families, what they replace may be unknown."""
    for pattern, style in plan.items():
        if style in _STYLES_OF_HUGGING_FACE:
            yield pattern, Rule(_STYLES_OF_HUGGING_FACE[style])
        elif family not in _FAMILIES:
            raise PlanError(
                f"the tp_plan of this {family} model shares {pattern!r} in the style {style!r}, "
                f"which Plait does not have. Give rules={{{pattern!r}: style}} for every module "
                f"with parameters; styles: {', '.join(Style)}."
            )


def _rest_whole(model: nn.Module, start: str, rules: Rules) -> dict[str, Rule]:
    """What an unknown family's plan leaves out is whole, unless it stands beside shared products.

    There its gradients could be partial without anybody saying so; it stays without a rule.
    """
    names = [name.removeprefix(start) for name, _ in _owners(model)]
    beside = {_parent(name) for name in names if _rule_of(name, rules) is not None}
    return {name: Rule(Style.WHOLE) for name in names if _parent(name) not in beside}


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have parameters of their own."""
    for name, module in _modules(model):
        if any(True for _ in module.parameters(recurse=False)):
            yield name, module


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules())


def _match(model: nn.Module, rules: Rules) -> dict[str, Rule]:
    found = {name: _rule_of(name, rules) for name, _ in _modules(model)}
    return {name: rule for name, rule in found.items() if rule is not None}


def _rule_of(name: str, rules: Rules) -> Rule | None:
    """The last rule that matches, with an exact name before any pattern."""
    if name in rules:
        return rules[name]
    matching = [rule for pattern, rule in rules.items() if _pattern(pattern).fullmatch(name)]
    return matching[-1] if matching else None


def _pattern(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))


def _check_patterns(model: nn.Module, given: Rules) -> None:
    names = [name for name, _ in _modules(model)]
    for pattern in given:
        if not any(_pattern(pattern).fullmatch(name) for name in names):
            hint = nearest_name(pattern, [name for name, _ in _owners(model)][:40])
            raise PlanError(f"the rule for {pattern!r} matches no module. {hint}")


def _check_complete(model: nn.Module, found: Rules) -> None:
    missing = [name for name, _ in _owners(model) if name not in found]
    if missing:
        raise PlanError(
            f"{type(model).__name__} has modules with parameters but no rule: "
            f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. "
            f"Give rules={{name or pattern: style}}; styles: {', '.join(Style)}."
        )


def _check_own_head(model: nn.Module, found: Rules) -> None:
    """The loss of our models reads the weight of the head, all of it."""
    head = found.get("lm_head", Rule(Style.WHOLE))
    if _is_own(model) and head.style is not Style.WHOLE:
        raise PlanError(
            f"the head of a {type(model).__name__} must be 'whole', the rules say "
            f"{head.style.value!r}: its loss uses the whole weight. Leave lm_head out of the rules."
        )


def _is_own(model: nn.Module) -> bool:
    return type(model).__module__.startswith("plait.models.")


def _check_counts(family: FamilyRules, plan: ParallelPlan) -> None:
    wrong = [f"{name}={count}" for name, count in family.counts.items() if count % plan.tp]
    if wrong:
        legal = ", ".join(map(str, legal_sizes(family.counts)))
        raise PlanError(f"tp={plan.tp} does not divide {', '.join(wrong)}. Choose tp from {legal}.")


def _unknown(model: nn.Module) -> str:
    owners = [name for name, _ in _owners(model)]
    return (
        f"there are no rules for {type(model).__name__}: it is no model of Plait, none of "
        f"transformers' {', '.join(_FAMILIES)}, and it has no tp_plan. Give rules={{name or "
        f"pattern: style}} for its modules with parameters: {', '.join(owners[:8])}"
        f"{', ...' if len(owners) > 8 else ''}; styles: {', '.join(Style)}."
    )
