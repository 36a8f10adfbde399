"""Operators put apart so that what treats tokens alike can be split: before `tokens.py`.

The backward of a layer norm makes the gradient of its input, token by token, and those of its
weights, sums over all tokens: two nodes instead of one. A dropout draws its mask for all tokens at
once, from the stream of random numbers where eager PyTorch draws it, and then multiplies: two nodes
as well. A constant made after the kind of a tensor (`new_full`) reads nothing of it, and is made of
nothing. The same kernels compute the same bits.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator

import torch

from plait.compiler.rewrite import new_node, rewrite_joints
from plait.graph.graph import Graph, Module, Node

_aten = torch.ops.aten
_NORMS = {
    _aten.native_layer_norm_backward.default: 3,
    getattr(_aten._fused_rms_norm_backward, "default", None): 2,
}
_CONSTANTS = {
    _aten.new_full.default: _aten.full.default,
    _aten.new_ones.default: _aten.ones.default,
    _aten.new_zeros.default: _aten.zeros.default,
}


def separate(graph: Graph) -> Graph:
    """Put operators apart in every kind of piece."""
    return rewrite_joints(graph, separate_joint)


def separate_joint(joint: Module) -> bool:
    """Put operators apart, in place; say whether there were any."""
    changed = False
    for node in list(joint.graph.nodes):
        if node.target in _NORMS:
            changed |= _separate_norm(node)
        elif node.target is _aten.native_dropout.default and node.args[2]:
            _separate_dropout(node)
            changed = True
        elif node.target in _CONSTANTS:
            _separate_constant(node)
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
            part = new_node(node, node.target, (*node.args[:-1], kept))
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
        ones = new_node(node, _aten.ones.default, (list(value.shape),), kwargs)
        drawn = new_node(node, node.target, (ones, *node.args[1:]))
        scaled = new_node(node, operator.getitem, (drawn, 0))
    for i, user in users.items():
        with graph.inserting_before(user):
            if i == 0:
                user.replace_all_uses_with(new_node(user, _aten.mul.Tensor, (x, scaled)))
                graph.erase_node(user)
            else:
                user.replace_input_with(node, drawn)
    graph.erase_node(node)  # else it would draw as well


def _separate_constant(node: Node) -> None:
    value = node.meta["val"]
    kwargs = {"dtype": value.dtype, "layout": value.layout, "device": value.device}
    with node.graph.inserting_before(node):
        made = new_node(node, _CONSTANTS[node.target], node.args[1:], kwargs)
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)
