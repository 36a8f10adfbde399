"""Cross-entropy of a linear layer's outputs becomes one operator that holds a group of logits.

Looks for the last product, its log-softmax and its negative log-likelihood in the joint graph of a
template, forward and backward, and puts `plait::linear_cross_entropy` in their place, which works
on some rows at a time and has the gradients ready when the forward ends, or all but the weight's.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from plait.compiler.group import num_bytes
from plait.compiler.rewrite import part_again, pass_saved
from plait.graph.graph import Graph, Node, Template
from plait.graph.island import looks_only
from plait.graph.note import Note
from plait.ops.linear_cross_entropy import is_one_group

_aten, _plait = torch.ops.aten, torch.ops.plait
_MEAN, _SUM = 1, 2  # of aten's reductions
_BY = "loss without logits"


def fuse_loss(graph: Graph) -> Graph:
    """Replace the loss wherever that keeps fewer bytes; a note says where not, and why."""
    graph = graph.copy()
    notes: list[Note] = []
    for template in graph.templates.values():
        for node in _losses(template):
            found = _match(node)
            if isinstance(found, str):
                notes.append(_note(node, found, is_refusal=True))
                continue
            _replace(template, found)
            part_again(template)
            notes.append(_note(node, "holds a group of logits at a time", is_refusal=False))
    pass_saved(graph)
    graph.notes = (*graph.notes, *notes)
    return graph


@dataclass(frozen=True)
class _Loss:
    """The nodes of a loss; the two products of its backward.

    is_one_group: all logits are kept, and the one for the weight stays in the backward.
    """

    loss: Node
    product: Node
    targets: Node
    is_mean: bool
    ignored: int
    backward: Node
    to_hidden: Node | None
    to_weight: Node | None
    is_one_group: bool


def _losses(template: Template) -> list[Node]:
    if template.joint is None:
        return []
    return list(
        template.joint.graph.find_nodes(
            op="call_function", target=_aten.nll_loss_forward.default, sort=True
        )
    )


def _match(node: Node) -> _Loss | str:
    """The loss around a negative log-likelihood, or why it stays as it is."""
    log_p, targets, weights, reduction, ignored = node.args
    if weights is not None or reduction not in (_MEAN, _SUM) or ignored >= 0:
        return "it weights classes, keeps every row's loss, or leaves out a class that exists"
    if log_p.target is not _aten._log_softmax.default:
        return "what comes before it is no log-softmax"
    product = _behind(log_p.args[0])
    if product.target is not _aten.mm.default or log_p.meta["val"].dtype != torch.float32:
        return "the logits are no plain product, or their softmax is not in float32"
    if product.args[1].target is not _aten.t.default:
        return "the weight is not one of a linear layer"
    if len(_last_users(product)) > 1:
        return "the logits have other uses"
    backward = [x for x in log_p.users if x.target is _aten.nll_loss_backward.default]
    softmax = [x for x in log_p.users if x.target is _aten._log_softmax_backward_data.default]
    if len(backward) != 1 or len(softmax) != 1 or len(log_p.users) != 3:
        return "the log-probabilities have other uses"
    to_hidden = to_weight = None
    for user in _last_users(softmax[0]):
        is_product = user.target is _aten.mm.default
        if is_product and _root(user.args[1]) is _root(product.args[1]):
            to_hidden = user
        elif is_product and _root(user.args[1]) is _root(product.args[0]):
            to_weight = user
        else:
            return "the gradient of the logits has other uses"
    hidden, weight = product.args[0], product.args[1].args[0]
    in_one = is_one_group(hidden.meta["val"], weight.meta["val"])
    kept = num_bytes([hidden, weight] if to_weight is not None else [hidden])
    if not in_one and kept >= num_bytes([log_p]):
        return "the gradients that it would keep are larger than the logits"
    gradients = (to_hidden, to_weight, in_one)
    return _Loss(node, product, targets, reduction == _MEAN, ignored, backward[0], *gradients)


def _replace(template: Template, found: _Loss) -> None:
    assert template.joint is not None
    graph: Any = template.joint.graph
    hidden, weight = found.product.args[0], found.product.args[1].args[0]
    with graph.inserting_before(found.loss):
        args = (hidden, weight, found.targets, hidden.meta["val"].dtype, True, 0.0)
        in_one, in_many = _plait.linear_cross_entropy_rows, _plait.linear_cross_entropy
        fused = (in_one if found.is_one_group else in_many).default
        whole = _add(graph, fused, (*args, found.to_weight is not None))
        loss, to_hidden, kept = (_add(graph, operator.getitem, (whole, i)) for i in range(3))
        if found.is_one_group:
            loss = _add(graph, _aten.sum.default, (loss,))
        counted = _add(graph, _aten.ne.Scalar, (found.targets, found.ignored))
        count = _add(graph, _aten.sum.default, (counted,), {"dtype": torch.float32})
        result = _add(graph, _aten.div.Tensor, (loss, count)) if found.is_mean else loss
    for part in list(found.loss.users):
        part.replace_all_uses_with(result if part.args[1] == 0 else count)
    with graph.inserting_before(found.backward):
        scale = found.backward.args[0]
        if found.is_mean:
            scale = _add(graph, _aten.div.Tensor, (scale, count))
        if found.to_hidden is not None:
            found.to_hidden.replace_all_uses_with(_add(graph, _aten.mul.Tensor, (to_hidden, scale)))
        if found.to_weight is not None and found.is_one_group:
            scaled = _add(graph, _aten.mul.Tensor, (hidden, scale))
            dlogits = _add(graph, _aten.t.default, (kept,))
            found.to_weight.replace_all_uses_with(_add(graph, _aten.mm.default, (dlogits, scaled)))
        elif found.to_weight is not None:
            found.to_weight.replace_all_uses_with(_add(graph, _aten.mul.Tensor, (kept, scale)))
    graph.eliminate_dead_code()


def _add(graph: fx.Graph, target: Any, args: tuple, kwargs: dict | None = None) -> Node:
    """A node with its value, computed on the fake values of its operands."""
    node: Any = graph.call_function(target, args, kwargs or {})
    values, named = fx.map_arg((args, kwargs or {}), lambda x: x.meta["val"])
    node.meta["val"] = target(*values, **named)
    return node


def _behind(node: Node) -> Node:
    """Through views and conversions to the operator behind them."""
    while looks_only(node) or node.target is _aten._to_copy.default:
        node = node.args[0]
    return node


def _root(node: Node) -> Node:
    while looks_only(node):
        node = node.args[0]
    return node


def _last_users(node: Node) -> list[Node]:
    """Who uses a value, seen through views and conversions."""
    found = []
    for user in node.users:
        is_seen_through = looks_only(user) or user.target is _aten._to_copy.default
        found += _last_users(user) if is_seen_through else [user]
    return list(dict.fromkeys(found))


def _note(node: Node, text: str, *, is_refusal: bool) -> Note:
    return Note(
        by=_BY, operator="aten.nll_loss_forward", node=node.name, text=text, is_refusal=is_refusal
    )
