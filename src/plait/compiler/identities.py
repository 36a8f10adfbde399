"""Operators that need not run: those that change nothing, and conversions that were made before.

A first power, which autograd writes for the gradient of a square, copies its operand; without it
the operand itself is taken. Under autocast each product converts its own operand: query, key and
value the same one three times, and each copy is kept for the backward. One is enough. The bits are
the same.
"""

# pyright: basic
# (fx nodes are not typed.)

import torch

from plait.compiler.rewrite import rewrite_joints
from plait.graph.graph import Graph, Module, Node

_FIRST_POWER = torch.ops.aten.pow.Tensor_Scalar
_CONVERSION = torch.ops.aten._to_copy.default


def drop_identities(graph: Graph) -> Graph:
    """Take the operand, or the first conversion, instead, in every kind of piece."""
    return rewrite_joints(graph, _drop)


def _drop(joint: Module) -> bool:
    found = _first_powers(joint) | _conversions(joint)
    for node, same in found.items():
        while same in found:
            same = found[same]
        node.replace_all_uses_with(same)
        joint.graph.erase_node(node)
    return bool(found)


def _first_powers(joint: Module) -> dict[Node, Node]:
    """With their operands."""
    return {
        node: node.args[0]
        for node in joint.graph.find_nodes(op="call_function", target=_FIRST_POWER)
        if node.args[1] == 1
        and node.meta["val"].dtype == node.args[0].meta["val"].dtype
        and node.meta["val"].stride() == node.args[0].meta["val"].stride()
        and _is_inside(node)
    }


def _conversions(joint: Module) -> dict[Node, Node]:
    """Those that stand in the graph before, in the same words."""
    first: dict[tuple[Node, str], Node] = {}
    found: dict[Node, Node] = {}
    for node in joint.graph.find_nodes(op="call_function", target=_CONVERSION, sort=True):
        same = first.setdefault((node.args[0], str(sorted(node.kwargs.items()))), node)
        if same is not node and _is_inside(node) and _is_inside(same):
            found[node] = same
    return found


def _is_inside(node: Node) -> bool:
    """Whether it is no result: those are values of their own."""
    return all(user.op != "output" for user in node.users)
