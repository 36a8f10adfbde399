"""Rules of token independence, operator by operator.

A rule is given the dims of tokens of a node's operands and returns those of its result, or a
`Stop` that says why the node must see all tokens at once. A rule may be wrong about what a dim
means, never about what a node computes: a value that is whole may be sliced along any dim, and what
is independent along it may be computed slice by slice.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import plait.graph.exchange as _own_part_operator  # noqa: F401
import plait.ops.attention as _attention_operators  # noqa: F401
import plait.ops.linear_cross_entropy as _loss_operators  # noqa: F401
import plait.ops.strict_attention as _strict_attention_operators  # noqa: F401
import plait.ops.strict_linear as _strict_linear_operators  # noqa: F401
import plait.ops.strict_pointwise as _strict_pointwise_operators  # noqa: F401
import plait.ops.strict_silu as _strict_silu_operators  # noqa: F401
from plait.compiler import token_moves as moves
from plait.compiler.token_moves import (
    Known,
    Result,
    Rule,
    Stop,
    Tokens,
    dims_of,
    operand_tokens,
    shape_of,
)
from plait.graph.graph import Node

_aten = torch.ops.aten
_c10d = torch.ops._c10d_functional


def rule_of(node: Node, tokens: Known, region: set[Node]) -> Result:
    """Apply the rule of the node's operator. At least one operand has tokens."""
    target = node.target
    if target not in _TAKES_GATHERED and any(_is_gathered(tokens.get(x)) for x in _sources(node)):
        return Stop("shards of several ranks stand side by side in its operand")
    if target in _RULES:
        return _RULES[target](node, tokens, region)
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return _pointwise(node, tokens, region)
    return Stop(f"no rule knows {target}", _kept_in_place(node, tokens))


def place_of_whole(node: Node, total: int) -> tuple[Node, Tokens] | None:
    """Where tokens come back that no operand shows any more, as after a loss of shifted tokens.

    A slice's gradient has them in the dim that was cut, and of what ranks share they are that dim.
    Either is whole, and may be parted along any dim.
    """
    args: Any = node.args
    if node.target is _aten.slice_backward.default:
        value, dim = node, args[2]
    elif node.target is _plait.own_part.default:
        value, dim = args[0], args[1]
    else:
        return None
    shape = shape_of(value)
    dim %= len(shape)
    is_last = dim == len(shape) - 1
    return None if is_last or shape[dim] != total else (value, Tokens(dim, total, total))


def is_mask(node: Node) -> bool:
    """Whether it is the mask of a dropout, drawn for nothing but a shape (see `separate.py`)."""
    drawn: Any = node.args[0] if node.target is operator.getitem else None
    if drawn is None or drawn.target is not _aten.native_dropout.default:
        return False
    return drawn.args[0].target is _aten.ones.default


def _kept_in_place(node: Node, tokens: Known) -> object:
    """Results that have the shape of an operand with tokens have them, one may suppose, there."""
    known = [
        (x.meta["val"].shape, tokens[x])
        for x in _sources(node)
        if isinstance(tokens.get(x), Tokens)
    ]

    def place(value: object) -> Tokens | None:
        for shape, given in known:
            is_same = isinstance(value, Tensor) and value.shape == shape
            if is_same and isinstance(given, Tokens) and given.is_natural:
                return given
        return None

    value = node.meta["val"]
    if isinstance(value, tuple | list):
        return tuple(place(each) for each in value)
    return place(value)


def _sources(node: Node) -> list[Node]:
    return node.all_input_nodes


def _is_gathered(given: object) -> bool:
    each = given[0] if isinstance(given, tuple) and given else given
    return isinstance(each, Tokens) and each.is_gathered


def is_order_free(node: Node, tokens: Known) -> bool:
    """Whether the node sums over all tokens, in whatever order they are: weight gradients."""
    if node.target is _aten.sum.dim_IntList:
        found = tokens.get(node.args[0])
        return isinstance(found, Tokens) and found.dim in dims_of(node.args[1], node.args[0])
    if node.target is _aten.sum.default:
        return True
    if node.target is _aten.native_layer_norm_backward.default:
        return not node.args[-1][0]
    if node.target is _aten.mm.default:
        left, right = (tokens.get(x) for x in node.args[:2])
        return (
            isinstance(left, Tokens)
            and isinstance(right, Tokens)
            and (left.dim, right.dim) == (1, 0)
            and left.is_shard == right.is_shard
            and left.num_copies == right.num_copies == 1
        )
    return False


def _pointwise(node: Node, tokens: Known, region: set[Node]) -> Result:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return Stop(f"{node.target} makes several results")
    found: Tokens | None = None
    labelled = sorted(
        (x for x in node.all_input_nodes if isinstance(tokens.get(x), Tokens)),
        key=lambda x: x not in region,
    )
    for source in labelled:
        given = tokens[source]
        assert isinstance(given, Tokens)
        dim = given.dim + value.dim() - source.meta["val"].dim()
        here = replace(given, dim=dim)
        if value.shape[dim] != given.length:
            return Stop(f"{source.name} is broadcast along its tokens")
        if found is None:
            found = here
        elif here != found and (source in region or not here.is_natural or not found.is_natural):
            return Stop(f"its operands have their tokens in different places: {found}, {here}")
    assert found is not None
    if not found.is_natural:
        for source in node.all_input_nodes:
            if source not in labelled and _aligned(source, value, found.dim):
                return Stop(f"{source.name} is in the order of ranks, its other operand is not")
    return found


def _aligned(source: Node, value: Tensor, dim: int) -> bool:
    """Whether the operand has a size of its own along that dim of the result."""
    own = source.meta.get("val")
    if not isinstance(own, Tensor):
        return False
    at = dim - (value.dim() - own.dim())
    return at >= 0 and own.shape[at] != 1


def _along(position: int, default: object = None) -> Rule:
    """Rule of an operator that works along the dims in an argument, keeping all dims."""

    def rule(node: Node, tokens: Known, region: set[Node]) -> Result:
        result = _pointwise(node, tokens, region)
        if not isinstance(result, Tokens):
            return result
        given = node.args[position] if len(node.args) > position else default
        if result.dim in dims_of(given, node.args[0]):
            return Stop(f"{node.target} works along the tokens", result)
        return result

    return rule


def _sort(node: Node, tokens: Known, region: set[Node]) -> Result:
    """Values and indices along a dim; its place in the arguments is the last number but flags."""
    given = operand_tokens(node, tokens)
    assert given is not None
    at = 2 if node.target is _aten.topk.default else 1
    dim = (node.args[at] if len(node.args) > at else -1) % node.args[0].meta["val"].dim()
    if dim == given.dim:
        return Stop("it sorts tokens")
    return tuple(given for _ in node.meta["val"])


def _reduce(node: Node, tokens: Known, region: set[Node]) -> Result:
    given = operand_tokens(node, tokens)
    assert given is not None
    dims = dims_of(node.args[1] if len(node.args) > 1 else None, node.args[0])
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if given.dim in dims:
        return Stop("it sums over tokens")
    dim = given.dim if keep else given.dim - sum(each < given.dim for each in dims)
    result = replace(given, dim=dim)
    value = node.meta["val"]
    return tuple(result for _ in value) if isinstance(value, tuple | list) else result


def _mm(node: Node, tokens: Known, region: set[Node]) -> Result:
    left, right = operand_tokens(node, tokens, 0), operand_tokens(node, tokens, 1)
    if (left is not None and left.dim == 1) or (right is not None and right.dim == 0):
        return Stop("it sums over tokens")
    if left is not None and right is not None:
        return Stop("both of its operands have tokens", left)
    if left is not None:
        return left
    assert right is not None
    return replace(right, dim=1)


def _addmm(node: Node, tokens: Known, region: set[Node]) -> Result:
    left, right = operand_tokens(node, tokens, 1), operand_tokens(node, tokens, 2)
    if left is None or right is not None or left.dim == 1:
        return Stop("it sums over tokens")
    bias = node.args[0].meta["val"]
    if bias.dim() > 1 and bias.shape[0] != 1:
        return Stop("its first operand has rows")
    return left


def _bmm(node: Node, tokens: Known, region: set[Node]) -> Result:
    left, right = operand_tokens(node, tokens, 0), operand_tokens(node, tokens, 1)
    if left is not None and right is not None and (left.dim, right.dim) == (0, 0):
        return left if left == right else Stop("its operands are folded differently")
    if left is not None and left.dim == 1 and (right is None or right.is_natural):
        # Rows of the left operand, against all of the right: scores, if its columns are tokens.
        return replace(left, is_square=right is not None and right.dim == 2)
    # The gradient of keys or values, or of their transpose: the dim that comes from the scores has
    # their tokens, or where those are not known as such, the one of that size.
    sides = ((1, left), (2, right))
    known = [dim for dim, x in sides if x is not None and x.is_square]
    for dim in known if len(known) == 1 else (1, 2):
        for x in (left, right):
            if x is not None and x.is_natural and x.length == node.meta["val"].shape[dim]:
                return Stop("it sums over tokens", replace(x, dim=dim, is_square=False))
    return Stop("it sums over tokens")


def takes_whole(node: Node, operand: Node, tokens: Known) -> bool:
    """Whether a part of the node needs all tokens of the operand."""
    result = tokens[node]
    return (
        node.target is _aten.bmm.default
        and isinstance(result, Tokens)
        and result.dim == 1
        and operand is node.args[1]
        and operand in tokens
    )


def _rows(node: Node, tokens: Known, region: set[Node]) -> Result:
    """X @ w.T, row by row."""
    left, right = operand_tokens(node, tokens, 0), operand_tokens(node, tokens, 1)
    if left is None or left.dim != 0 or right is not None:
        return Stop("it sums over tokens")
    return left


def _row_losses(node: Node, tokens: Known, region: set[Node]) -> Result:
    """Of each row its loss, and its gradients where there are any."""
    given = operand_tokens(node, tokens)
    if given is None or given.dim != 0 or not given.is_natural:
        return Stop("its rows are not those of the targets")
    return tuple(given if value.shape[0] == given.length else None for value in node.meta["val"])


def _grouped_loss(node: Node, tokens: Known, region: set[Node]) -> Result:
    return Stop("it sums over tokens, of which it holds the logits of a group at a time")


def _embedding(node: Node, tokens: Known, region: set[Node]) -> Result:
    given = operand_tokens(node, tokens, 1)
    return given if given is not None else Stop("its table has tokens")


def _index_put(node: Node, tokens: Known, region: set[Node]) -> Result:
    """With one mask over the first dims, it sets rows to a number."""
    given = operand_tokens(node, tokens)
    indices, value = node.args[1], node.args[2].meta["val"]
    mask = indices[0].meta["val"] if len(indices) == 1 and indices[0] is not None else None
    if given is None or mask is None or mask.dtype is not torch.bool or value.numel() != 1:
        return Stop("it writes to places that are known only when it runs")
    if given.dim >= mask.dim() or tokens.get(indices[0]) not in (given, None):
        return Stop("its mask has tokens in another place")
    return given


def _layer_norm(node: Node, tokens: Known, region: set[Node]) -> Result:
    given = operand_tokens(node, tokens)
    assert given is not None
    if given.dim >= node.args[0].meta["val"].dim() - len(node.args[1]):
        return Stop("it takes the mean over tokens")
    return tuple(given for _ in node.meta["val"])


def _layer_norm_backward(node: Node, tokens: Known, region: set[Node]) -> Result:
    """Of the gradient of the input only; `prepare.py` puts those of the weights apart."""
    given = operand_tokens(node, tokens)
    mask = node.args[-1]
    if mask[0] and not any(mask[1:]) and given is not None:
        return (given, *(None for _ in mask[1:]))
    return Stop("it sums over tokens")


def _all_reduce(node: Node, tokens: Known, region: set[Node]) -> Result:
    given = operand_tokens(node, tokens)
    assert given is not None
    return given


def _all_gather(node: Node, tokens: Known, region: set[Node]) -> Result:
    given = operand_tokens(node, tokens)
    assert given is not None
    if given.dim != 0 and given.is_shard:
        return replace(given, is_shard=False, is_gathered=True)
    if given.dim != 0:
        return given
    length = node.meta["val"].shape[0]
    if given.is_shard:
        return replace(given, length=length, is_shard=False)
    return replace(given, length=length, num_copies=length // given.length)


def _reduce_scatter(node: Node, tokens: Known, region: set[Node]) -> Result:
    given = operand_tokens(node, tokens)
    assert given is not None
    if given.is_gathered:
        return replace(given, is_gathered=False, is_shard=True)
    if given.dim != 0:
        return given
    length = node.meta["val"].shape[0]
    if given.num_copies == given.length // length:
        return replace(given, length=length, num_copies=1)
    if not given.is_natural:
        return Stop("it scatters shards")
    return replace(given, length=length, is_shard=True)


def _attention(node: Node, tokens: Known, region: set[Node]) -> Result:
    """Independent along the batch; along the tokens whole, and known to keep them in place."""
    given = operand_tokens(node, tokens)
    value = node.meta["val"]
    first = value[0] if isinstance(value, tuple | list) else value
    if given is None or first.dim() != node.args[0].meta["val"].dim():
        return Stop("attention takes each token with others")
    operands = [tokens.get(x) for x in node.all_input_nodes if x.meta["val"].dim() >= 3]
    is_batch = given.dim == 0 and all(x == given for x in operands)
    labels = []
    for each in value if isinstance(value, tuple | list) else (value,):
        fits = (
            isinstance(each, Tensor)
            and each.dim() > given.dim
            and each.shape[given.dim] == given.length
        )
        labels.append(given if fits else None)
    found = tuple(labels) if isinstance(value, tuple | list) else labels[0]
    if is_batch and labels[0] is not None:
        return found
    return Stop("attention takes each token with others", found)


def _passes(node: Node, tokens: Known, region: set[Node]) -> Result:
    """Mixes tokens, and leaves them where they are."""
    given = operand_tokens(node, tokens)
    value = node.meta["val"]
    fits = given is not None and isinstance(value, Tensor) and value.shape == shape_of(node.args[0])
    return Stop(f"{node.target} takes each token with others", given if fits else None)


_plait = torch.ops.plait
_TAKES_GATHERED = {
    operator.getitem,
    _aten.cat.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.split.Tensor,
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _c10d.reduce_scatter_tensor.default,
    _c10d.wait_tensor.default,
}
_VIEWS = (_aten.view, _aten._unsafe_view, _aten.reshape, _aten._reshape_alias)
_ALONG: dict[object, Rule] = {
    _aten._softmax.default: _along(1),
    _aten._safe_softmax.default: _along(1),
    _aten._log_softmax.default: _along(1),
    _aten._softmax_backward_data.default: _along(2),
    _aten._log_softmax_backward_data.default: _along(2),
    _aten.cumsum.default: _along(1),
    _aten.flip.default: _along(1),
    _aten.roll.default: _along(2),
}
_RULES: dict[object, Rule] = {
    **_ALONG,
    operator.getitem: moves.getitem,
    _aten.t.default: moves.transpose,
    _aten.transpose.int: moves.transpose,
    _aten.permute.default: moves.permute,
    _aten.unsqueeze.default: moves.unsqueeze,
    _aten.squeeze.dim: moves.squeeze,
    _aten.squeeze.dims: moves.squeeze,
    _aten.squeeze.default: moves.squeeze,
    _aten.expand.default: moves.expand,
    _aten.clone.default: _pointwise,
    _aten._to_copy.default: _pointwise,
    _aten.contiguous.default: _pointwise,
    _aten.alias.default: _pointwise,
    _aten.detach.default: _pointwise,
    _aten.zeros_like.default: _pointwise,
    _aten.ones_like.default: _pointwise,
    _aten.full_like.default: _pointwise,
    _aten.tril.default: _passes,
    _aten.triu.default: _passes,
    _aten.slice.Tensor: moves.slice_tokens,
    _aten.select.int: moves.select,
    _aten.slice_backward.default: moves.slice_backward,
    _aten.split.Tensor: moves.split,
    _aten.split_with_sizes.default: moves.split,
    _aten.cat.default: moves.cat,
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
    _aten.embedding.default: _embedding,
    _aten.index_put.default: _index_put,
    _aten.topk.default: _sort,
    _aten.sort.default: _sort,
    _aten.mean.dim: _reduce,
    _aten.mean.default: _reduce,
    _aten.sum.default: _reduce,
    _aten.sum.dim_IntList: _reduce,
    _aten.amax.default: _reduce,
    _aten.amin.default: _reduce,
    _aten.argmax.default: _reduce,
    _aten.logsumexp.default: _reduce,
    _aten.var_mean.correction: _reduce,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.native_layer_norm_backward.default: _layer_norm_backward,
    _c10d.wait_tensor.default: _all_reduce,
    _c10d.all_reduce.default: _all_reduce,
    _c10d.all_gather_into_tensor.default: _all_gather,
    _c10d.reduce_scatter_tensor.default: _reduce_scatter,
    _plait.own_part.default: moves.own_part,
    _plait.strict_linear.default: _rows,
    _plait.linear_cross_entropy.default: _grouped_loss,
    _plait.linear_cross_entropy_rows.default: _row_losses,
    _plait.strict_pointwise.default: _pointwise,
    _plait.strict_silu.default: _pointwise,
    _plait.strict_silu_backward.default: _pointwise,
    **{overload: moves.view for packet in _VIEWS for overload in [packet.default]},
}
_RULES |= dict.fromkeys(
    (
        _plait.blocked_causal_attention.default,
        _plait.blocked_causal_attention_backward.default,
        _plait.strict_causal_attention.default,
        _plait.strict_causal_attention_backward.default,
    ),
    _attention,
)
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
for _name in _ATTENTION:
    for _suffix in ("", "_backward"):
        _packet = getattr(_aten, _name + _suffix, None)
        if _packet is not None:
            _RULES[_packet.default] = _attention


def part_dim(node: Node, operand: Node, tokens: Known) -> int | None:
    """The dim along which a whole operand is sliced for a part of a node; None: not at all."""
    result: Any = tokens[node]
    given = tokens.get(operand)
    dim = given.dim if isinstance(given, Tokens) else None
    target = node.target
    if target in (_aten.mm.default, _aten.bmm.default):
        assert isinstance(result, Tokens)
        by_rows = target is _aten.bmm.default and result.dim == 0
        side = result.dim if target is _aten.mm.default else 0
        return dim if by_rows or operand is node.args[side] else None
    if target is _aten.addmm.default:
        return dim if operand is node.args[1] else None
    if target is _plait.strict_linear.default:
        return dim if operand is node.args[0] else None
    if target is _plait.linear_cross_entropy_rows.default:
        return None if operand is node.args[1] else 0
    if target is _aten.embedding.default:
        return dim if operand is node.args[1] else None
    if target is _aten.index_put.default:
        return result.dim if operand is node.args[0] or operand in node.args[1] else None
    if isinstance(result, Tokens) and _is_pointwise(target):
        value, own = node.meta["val"], operand.meta["val"]
        if not isinstance(own, Tensor):
            return None
        at = result.dim - (value.dim() - own.dim())
        return at if at >= 0 and own.shape[at] == result.length and own.shape[at] != 1 else None
    return dim


def _is_pointwise(target: object) -> bool:
    return (
        _RULES.get(target) is _pointwise
        or target in _ALONG
        or (
            target not in _RULES
            and isinstance(target, torch._ops.OpOverload)
            and torch.Tag.pointwise in target.tags
        )
    )
