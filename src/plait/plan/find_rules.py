"""`find_rules`: the rule of each module of a model, by its family or by its user."""

from collections.abc import Mapping

from torch import nn

from plait.errors import PlanError, nearest_name
from plait.plan.family_rules import FAMILIES, FamilyRules, is_own, rules_of_family
from plait.plan.parallel_plan import ParallelPlan
from plait.plan.rules import (
    GivenRules,
    Rule,
    Rules,
    Style,
    as_rule,
    compiled,
    modules,
    owners,
    rule_of,
)


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
    family = rules_of_family(model, plan)
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


def legal_sizes(counts: Mapping[str, int]) -> list[int]:
    """All values of tp that divide every count."""
    smallest = min(counts.values())
    return [n for n in range(1, smallest + 1) if all(c % n == 0 for c in counts.values())]


def _match(model: nn.Module, rules: Rules) -> dict[str, Rule]:
    found = {name: rule_of(name, rules) for name, _ in modules(model)}
    return {name: rule for name, rule in found.items() if rule is not None}


def _check_patterns(model: nn.Module, given: Rules) -> None:
    names = [name for name, _ in modules(model)]
    for pattern in given:
        if not any(compiled(pattern).fullmatch(name) for name in names):
            hint = nearest_name(pattern, [name for name, _ in owners(model)][:40])
            raise PlanError(f"the rule for {pattern!r} matches no module. {hint}")


def _check_complete(model: nn.Module, found: Rules) -> None:
    missing = [name for name, _ in owners(model) if name not in found]
    if missing:
        raise PlanError(
            f"{type(model).__name__} has modules with parameters but no rule: "
            f"{', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}. "
            f"Give rules={{name or pattern: style}}; styles: {', '.join(Style)}."
        )


def _check_own_head(model: nn.Module, found: Rules) -> None:
    """The loss of our models reads the weight of the head, all of it."""
    head = found.get("lm_head", Rule(Style.WHOLE))
    if is_own(model) and head.style is not Style.WHOLE:
        raise PlanError(
            f"the head of a {type(model).__name__} must be 'whole', the rules say "
            f"{head.style.value!r}: its loss uses the whole weight. Leave lm_head out of the rules."
        )


def _check_counts(family: FamilyRules, plan: ParallelPlan) -> None:
    wrong = [f"{name}={count}" for name, count in family.counts.items() if count % plan.tp]
    if wrong:
        legal = ", ".join(map(str, legal_sizes(family.counts)))
        raise PlanError(f"tp={plan.tp} does not divide {', '.join(wrong)}. Choose tp from {legal}.")


def _unknown(model: nn.Module) -> str:
    names = [name for name, _ in owners(model)]
    return (
        f"there are no rules for {type(model).__name__}: it is no model of Plait, none of "
        f"transformers' {', '.join(FAMILIES)}, and it has no tp_plan. Give rules={{name or "
        f"pattern: style}} for its modules with parameters: {', '.join(names[:8])}"
        f"{', ...' if len(names) > 8 else ''}; styles: {', '.join(Style)}."
    )
