"""Operators that change nothing: a first power, which autograd writes for the gradient of a square.

The kernel copies its operand. Without it the operand itself is taken, the same bits.
"""

# pyright: basic
# (fx nodes are not typed.)

import torch

from plait.compiler.rewrite import rewrite_joints
from plait.graph.graph import Graph, Module

_FIRST_POWER = torch.ops.aten.pow.Tensor_Scalar


def drop_identities(graph: Graph) -> Graph:
    """Take the operand instead, in every kind of piece."""
    return rewrite_joints(graph, _drop)


def _drop(joint: Module) -> bool:
    found = [
        node
        for node in joint.graph.find_nodes(op="call_function", target=_FIRST_POWER)
        if node.args[1] == 1
        and node.meta["val"].dtype == node.args[0].meta["val"].dtype
        and node.meta["val"].stride() == node.args[0].meta["val"].stride()
        and all(user.op != "output" for user in node.users)  # results are values of their own
    ]
    for node in found:
        node.replace_all_uses_with(node.args[0])
        joint.graph.erase_node(node)
    return bool(found)
