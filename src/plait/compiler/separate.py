"""Operators put apart so that what treats tokens alike can be split: before `tokens.py`.

The backward of a layer norm makes the gradient of its input, token by token, and those of its
weights, sums over all tokens: two nodes instead of one. A dropout draws its mask for all tokens at
once, from the stream of random numbers where eager PyTorch draws it, and then multiplies: two nodes
as well. The same kernels compute the same bits.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from typing import Any

import torch
from torch import fx

from plait.compiler.recompute import drop_unused_parts, pass_saved
from plait.graph.graph import BACKWARD, Graph, Module, Node, call_of
from plait.graph.partition import part_joint

_aten = torch.ops.aten
_NORMS = {
    _aten.native_layer_norm_backward.default: 3,
    getattr(_aten._fused_rms_norm_backward, "default", None): 2,
}


def separate(graph: Graph) -> Graph:
    """Put operators apart in every kind of piece."""
    graph = graph.copy()
    for template in graph.templates.values():
        joint = template.joint or template.forward
        if separate_joint(joint) and template.joint is not None:
            parts = part_joint(
                joint, num_arguments=len(template.arguments), num_results=len(template.results)
            )
            template.forward, template.backward = parts.forward, parts.backward
            template.saved = parts.saved
    for node in graph.root.graph.nodes:
        called = call_of(node)
        if called is not None and called[1] == BACKWARD:
            pass_saved(node, graph.templates[called[0]])
    drop_unused_parts(graph.root)
    return graph


def separate_joint(joint: Module) -> bool:
    """Put operators apart, in place; say whether there were any."""
    changed = False
    for node in list(joint.graph.nodes):
        if node.target in _NORMS:
            changed |= _separate_norm(node)
        elif node.target is _aten.native_dropout.default and node.args[2]:
            _separate_dropout(node)
            changed = True
    if changed:
        joint.graph.eliminate_dead_code()
        joint.recompile()
    return changed


def _separate_norm(node: Node) -> bool:
    mask = list(node.args[-1])
    if not mask[0] or not any(mask[1:]):
        return False
    users = {user.args[1]: user for user in node.users}
    for kept in ([True] + [False] * (len(mask) - 1), [False, *mask[1:]]):
        taken = [i for i in users if kept[i]]
        if not taken:
            continue
        with node.graph.inserting_before(node):
            part = _call(node.graph, node.target, (*node.args[:-1], kept), {}, node)
        for i in taken:
            users[i].replace_input_with(node, part)
    return True


def _separate_dropout(node: Node) -> None:
    """dropout(x) = x * dropout(ones): a product with the scaled mask has the same bits."""
    graph, x = node.graph, node.args[0]
    users = {user.args[1]: user for user in node.users}
    with graph.inserting_before(node):
        value = x.meta["val"]
        kwargs = {"dtype": value.dtype, "layout": torch.strided, "device": value.device}
        ones = _call(graph, _aten.ones.default, (list(value.shape),), kwargs, node)
        drawn = _call(graph, node.target, (ones, *node.args[1:]), {}, node)
        scaled = _call(graph, operator.getitem, (drawn, 0), {}, node)
    for i, user in users.items():
        with graph.inserting_before(user):
            if i == 0:
                user.replace_all_uses_with(_call(graph, _aten.mul.Tensor, (x, scaled), {}, user))
                graph.erase_node(user)
            else:
                user.replace_input_with(node, drawn)
    graph.erase_node(node)  # else it would draw as well


def _call(graph: fx.Graph, target: Any, args: tuple, kwargs: dict, like: Node) -> Node:
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: value for key, value in like.meta.items() if key != "val"}
    values: Any = fx.map_arg((args, kwargs), lambda x: x.meta["val"])
    if target is operator.getitem:
        node.meta["val"] = values[0][0][values[0][1]]
        return node
    known = like.meta["val"]
    first = known[0] if isinstance(known, tuple | list) else known
    with first.fake_mode:
        node.meta["val"] = target(*values[0], **values[1])
    return node
