"""Causal attention along the tokens: the queries of a part, and the keys of the parts up to it.

A query sees no later key, so part i of the queries needs parts 0..i of keys and values. Going
back, part i of their gradients is a sum over the parts from i on, the last first. Sums are grouped
otherwise than in the whole, so this is opt-in and equal within a tolerance only.
"""

# pyright: basic
# (fx nodes are not typed.)

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import plait.ops.attention as _registers_blocked  # noqa: F401
import plait.ops.causal_part as _registers_parts  # noqa: F401
import plait.ops.strict_attention as _registers_strict  # noqa: F401
from plait.compiler.token_moves import Known, Tokens
from plait.graph.graph import Node

_aten, _plait = torch.ops.aten, torch.ops.plait
_TOKEN_DIM = 2  # of queries, keys, values (B, N, T, H) and of sums of exponentials (B, N, T)


@dataclass(frozen=True)
class CausalParts:
    """How an attention is run on a part of the queries.

    target, args: the operator of a part, and what it takes, in nodes of the whole. keys: positions
    of the args of which a part needs all tokens up to its own. key_results: results that are of
    those tokens, of each part a summand.
    """

    target: Any
    args: tuple[Any, ...]
    keys: tuple[int, int]
    key_results: tuple[int, ...] = ()


def causal_parts(node: Node, is_mask: Callable[[Node], bool]) -> CausalParts | str | None:
    """How a node is split, or why that is not possible; None if it is no attention known here.

    is_mask: says whether a mask is known to be causal.
    """
    if node.target in _OWN:
        return _parts(node.target, node.args, is_backward=_OWN[node.target])
    if node.target not in _FLASH:
        return None
    schema = node.target._schema.arguments
    given = {each.name: each.default_value for each in schema if each.has_default_value()}
    given |= dict(zip((each.name for each in schema), node.args, strict=False)) | node.kwargs
    mask = given["attn_mask"]
    if mask is not None and (given["is_causal"] or not is_mask(mask)):
        return "what its mask hides is not known to be the later tokens, and no others"
    if mask is None and not given["is_causal"]:
        return "each token sees the later ones"
    if given["dropout_p"]:
        return "it has a dropout"
    query, key = (given[name].meta["val"].shape for name in ("query", "key"))
    if query[_TOKEN_DIM] != key[_TOKEN_DIM]:
        return "queries and keys differ in number"
    scale = given["scale"] if given["scale"] is not None else query[-1] ** -0.5
    target, names = _FLASH[node.target]
    args = (*(given[name] for name in names), scale)
    return _parts(target, args, is_backward=names[0] == "grad_out")


def causal_tokens(node: Node, parts: CausalParts, tokens: Known) -> Any:
    """Tokens of the results, if all operands have theirs where attention wants them; else None."""
    operands = [x for x in parts.args if isinstance(x, torch.fx.Node)]
    labels = {tokens.get(x) for x in operands}
    label = next(iter(labels))
    if len(labels) > 1 or not isinstance(label, Tokens) or not label.is_natural:
        return None
    if label.dim != _TOKEN_DIM or label.length != operands[0].meta["val"].shape[_TOKEN_DIM]:
        return None
    value = node.meta["val"]
    return tuple(label for _ in value) if isinstance(value, tuple | list) else label


def _parts(target: Any, args: Sequence[Any], *, is_backward: bool) -> CausalParts:
    """Forward q, k, v, ...; backward the gradient of the result before them."""
    if is_backward:
        return CausalParts(target, tuple(args), (2, 3), (1, 2))
    return CausalParts(target, tuple(args), (1, 2))


_FLASH = {
    _aten._scaled_dot_product_flash_attention_for_cpu.default: (
        _plait.causal_part_attention.default,
        ("query", "key", "value"),
    ),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (
        _plait.causal_part_attention_backward.default,
        ("grad_out", "query", "key", "value", "out", "logsumexp"),
    ),
}
# Those that take the last queries to all keys as they are, and whether they go back.
_OWN = {
    _plait.blocked_causal_attention.default: False,
    _plait.blocked_causal_attention_backward.default: True,
    _plait.strict_causal_attention.default: False,
    _plait.strict_causal_attention_backward.default: True,
}
