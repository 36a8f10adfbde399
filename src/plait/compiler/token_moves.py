"""Rules of token independence for operators that move values and compute nothing.

A value is named by its dim of tokens, `Tokens`; a rule says where they are after a view, a split,
a concatenation, or why they are nowhere (`Stop`). `token_rules.py` has the rules of arithmetic.
"""

# pyright: basic
# (fx nodes are not typed.)

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from plait.graph.graph import Node

_aten = torch.ops.aten


@dataclass(frozen=True)
class Tokens:
    """The dim of a value that counts tokens (or samples of the batch), and its size.

    total: how many there are in all; the dim may be folded with what follows, then length is a
    multiple. is_shard: the rank's share of the tokens under sequence parallelism. is_gathered: the
    shards of all ranks stand side by side along an outer dim. num_copies: the dim holds so many
    sets of tokens one after the other, one for each rank. is_square: the last other dim counts
    tokens too, the keys of scores of attention.
    """

    dim: int
    length: int
    total: int
    is_shard: bool = False
    is_gathered: bool = False
    num_copies: int = 1
    is_square: bool = field(default=False, compare=False)

    @property
    def is_natural(self) -> bool:
        """Whether a slice of the dim is a part of the tokens."""
        return not self.is_shard and self.is_row

    @property
    def is_row(self) -> bool:
        """Whether the dim has each token once: then parts side by side are all the rank has."""
        return not self.is_gathered and self.num_copies == 1


@dataclass(frozen=True)
class Stop:
    """The node is not split. tokens: where they are in its result, which is whole."""

    reason: str = ""
    tokens: object = None


Result = Tokens | tuple | Stop
Known = Mapping[Node, object]
Rule = Callable[[Node, Known, set], Result]


def shape_of(node: Node) -> tuple[int, ...]:
    """Shape of what the node makes."""
    return tuple(node.meta["val"].shape)


def dims_of(given: Any, node: Node) -> set[int]:
    """The dims in an argument, counted from the front; none given means all."""
    dims = [given] if isinstance(given, int) else list(given or range(node.meta["val"].dim()))
    return {dim % max(node.meta["val"].dim(), 1) for dim in dims}


def operand_tokens(node: Node, tokens: Known, i: int = 0) -> Tokens | None:
    """Tokens of the i-th argument, if it is one value that has them."""
    found = tokens.get(node.args[i]) if isinstance(node.args[i], torch.fx.Node) else None
    return found if isinstance(found, Tokens) else None


def view(node: Node, tokens: Known, region: set[Node]) -> Result:
    """A view keeps tokens where `refold` finds them."""
    source = node.args[0]
    given = operand_tokens(node, tokens)
    assert given is not None
    return refold(shape_of(source), shape_of(node), given) or Stop(
        f"a view from {list(shape_of(source))} to {list(shape_of(node))} mixes tokens and others"
    )


def refold(before: Sequence[int], after: Sequence[int], given: Tokens) -> Tokens | None:
    """Find the dim of tokens after a view, or None if it is no longer a dim of its own."""
    in_front = math.prod(before[: given.dim])
    passed = 1
    for dim, size in enumerate(after):
        if size == 1 and given.length != 1:
            continue
        if passed == in_front:
            if size == given.length:
                return replace(given, dim=dim)
            if in_front == 1 and size % given.length == 0:
                return replace(given, dim=dim, length=size)  # folded with what follows
            if in_front == 1 and given.length % size == 0:
                return _unfolded(dim, size, after, given)
            return None
        if given.is_gathered and passed == 1 and size == in_front * given.length:
            # Shards of all ranks, one after the other, are all tokens.
            return replace(given, dim=dim, length=size, is_gathered=False)
        passed *= size
        if passed > in_front:
            return None
    return None


def _unfolded(dim: int, size: int, after: Sequence[int], given: Tokens) -> Tokens | None:
    """Tokens that were one dim are now two: the ranks' shards, or tokens and what was folded in."""
    if given.is_shard or size % given.total == 0:
        return replace(given, dim=dim, length=size)
    inner = given.length // size
    if dim + 1 < len(after) and after[dim + 1] == inner:
        return replace(given, dim=dim + 1, length=inner, is_gathered=True)
    return None


def transpose(node: Node, tokens: Known, region: set[Node]) -> Result:
    """Two dims change places."""
    given, rank = operand_tokens(node, tokens), node.meta["val"].dim()
    assert given is not None
    first, second = (0, 1) if node.target is _aten.t.default else node.args[1:3]
    swap = {first % rank: second % rank, second % rank: first % rank}
    return replace(given, dim=swap.get(given.dim, given.dim))


def permute(node: Node, tokens: Known, region: set[Node]) -> Result:
    """All dims change places."""
    given = operand_tokens(node, tokens)
    assert given is not None
    order = [dim % len(node.args[1]) for dim in node.args[1]]
    return replace(given, dim=order.index(given.dim))


def unsqueeze(node: Node, tokens: Known, region: set[Node]) -> Result:
    """A dim of one element comes in."""
    given = operand_tokens(node, tokens)
    assert given is not None
    at = node.args[1] % node.meta["val"].dim()
    return replace(given, dim=given.dim + (at <= given.dim))


def squeeze(node: Node, tokens: Known, region: set[Node]) -> Result:
    """Dims of one element go, if they are not tokens."""
    given = operand_tokens(node, tokens)
    assert given is not None
    source = node.args[0].meta["val"]
    dims = dims_of(node.args[1], node.args[0]) if len(node.args) > 1 else set(range(source.dim()))
    gone = [dim for dim in dims if source.shape[dim] == 1]
    if given.dim in gone:
        return Stop("a single token is squeezed away")
    return replace(given, dim=given.dim - sum(dim < given.dim for dim in gone))


def expand(node: Node, tokens: Known, region: set[Node]) -> Result:
    """Other dims are repeated."""
    given = operand_tokens(node, tokens)
    assert given is not None
    dim = given.dim + node.meta["val"].dim() - node.args[0].meta["val"].dim()
    return replace(given, dim=dim)


def split(node: Node, tokens: Known, region: set[Node]) -> Result:
    """Taken apart along another dim, or along the tokens for all ranks at once."""
    given = operand_tokens(node, tokens)
    assert given is not None
    dim = (node.args[2] if len(node.args) > 2 else 0) % node.args[0].meta["val"].dim()
    parts = node.meta["val"]
    if given.is_gathered:
        if dim or not _all_in_one_cat(node, given.dim):
            return Stop("it takes shards of some ranks")
        return tuple(given for _ in parts)
    if dim != given.dim:
        return tuple(given for _ in parts)
    sizes = {part.shape[dim] for part in parts}
    (size,) = sizes if len(sizes) == 1 else (0,)
    if given.num_copies == len(parts):
        return tuple(replace(given, length=size, num_copies=1) for _ in parts)
    if size == 0 or not given.is_natural or not _all_in_one_cat(node, 0):
        return Stop("it takes some of the tokens")
    return tuple(replace(given, length=size, is_gathered=True) for _ in parts)


def _all_in_one_cat(split: Node, dim: int) -> bool:
    """Whether all parts, in their order, are put side by side along that dim, and nowhere else."""
    parts = {user.args[1]: user for user in split.users if user.target is operator.getitem}
    if sorted(parts) != list(range(len(split.meta["val"]))) or len(parts) != len(split.users):
        return False
    users = {user for part in parts.values() for user in part.users}
    if len(users) != 1:
        return False
    (cat,) = users
    order = [parts[i] for i in range(len(parts))]
    at = cat.args[1] if len(cat.args) > 1 else 0
    return cat.target is _aten.cat.default and list(cat.args[0]) == order and at == dim


def getitem(node: Node, tokens: Known, region: set[Node]) -> Result:
    """One of several results."""
    given = tokens.get(node.args[0])
    found = given[node.args[1]] if isinstance(given, tuple) else None
    if not isinstance(found, Tokens):
        return Stop()
    return found if node.args[0] in region else Stop(tokens=found)


def cat(node: Node, tokens: Known, region: set[Node]) -> Result:
    """Side by side along another dim, or what `split` took apart for ranks."""
    value = node.meta["val"]
    dim = (node.args[1] if len(node.args) > 1 else 0) % value.dim()
    found = {tokens.get(x) for x in node.args[0]}
    (given,) = found if len(found) == 1 else (None,)
    if not isinstance(given, Tokens):
        return Stop("not all of its operands have their tokens in the same place")
    if given.is_gathered:  # parts of one split: `_split` made sure of it
        is_all = dim == given.dim
        length = value.shape[dim] if is_all else given.length
        return replace(given, length=length, is_gathered=not is_all)
    if dim != given.dim:
        return given
    if not given.is_natural:
        return Stop("it puts tokens behind others")
    return replace(given, length=value.shape[dim], num_copies=len(node.args[0]))


def slice_tokens(node: Node, tokens: Known, region: set[Node]) -> Result:
    """A slice of another dim."""
    given = operand_tokens(node, tokens)
    assert given is not None
    value = node.meta["val"]
    if value.shape[given.dim] != given.length or value.dim() != node.args[0].meta["val"].dim():
        return Stop("it takes some of the tokens")
    return given


def slice_backward(node: Node, tokens: Known, region: set[Node]) -> Result:
    """The gradient of a slice of another dim."""
    given = operand_tokens(node, tokens)
    assert given is not None
    return given if node.args[2] != given.dim else Stop("it takes some of the tokens")


def own_part(node: Node, tokens: Known, region: set[Node]) -> Result:
    """A rank takes its share of tokens of an equal value."""
    given = operand_tokens(node, tokens)
    assert given is not None
    if node.args[1] % node.args[0].meta["val"].dim() != given.dim:
        return given
    if not given.is_natural:
        return Stop("it takes a share of shards")
    return replace(given, length=given.length // node.args[2], is_shard=True)


def select(node: Node, tokens: Known, region: set[Node]) -> Result:
    """One place of another dim."""
    given = operand_tokens(node, tokens)
    assert given is not None
    dim = node.args[1] % node.args[0].meta["val"].dim()
    if dim == given.dim:
        return Stop("it takes one token")
    return replace(given, dim=given.dim - (dim < given.dim))
