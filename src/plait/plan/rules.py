"""What a rank of the axis `tp` holds of each module: styles, rules, and rules by name.

Pure data. `family_rules.py` has the tables, `find_rules.py` looks up a model's, and
`graph/parallelize.py` does to the model what they say.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

from torch import nn

from plait.errors import PlanError, nearest_name


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
    LAYER = "layer"  # all of it; the first of the layers takes own tokens out of all
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


def rule_of(name: str, rules: Rules) -> Rule | None:
    """The last rule that matches, with an exact name before any pattern."""
    if name in rules:
        return rules[name]
    matching = [rule for pattern, rule in rules.items() if compiled(pattern).fullmatch(name)]
    return matching[-1] if matching else None


def compiled(pattern: str) -> re.Pattern[str]:
    """Read a pattern of module names: "*" stands for one part, as in "layers.*.mlp"."""
    return re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have parameters of their own."""
    for name, module in modules(model):
        if any(True for _ in module.parameters(recurse=False)):
            yield name, module


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, each once."""
    return cast("Iterator[tuple[str, nn.Module]]", model.named_modules())
