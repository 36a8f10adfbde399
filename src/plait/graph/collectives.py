"""Communication in a graph: which nodes start one, which wait for it, and over which group."""

# pyright: basic
# (fx nodes are not typed.)

import torch

from plait.graph.graph import Node

_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd")
_c10d = torch.ops._c10d_functional


def is_collective(node: Node) -> bool:
    """Whether the node starts a communication."""
    return (
        node.op == "call_function"
        and getattr(node.target, "namespace", None) in _NAMESPACES
        and not is_wait(node)
    )


def is_wait(node: Node) -> bool:
    """Whether the node waits until the result of a collective is there."""
    return node.target is _c10d.wait_tensor.default


def group_of(node: Node) -> str:
    """Name of the group that communicates."""
    return next(x for x in reversed(node.args) if isinstance(x, str))
