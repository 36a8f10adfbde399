"""Numbers of few values are computed before these are spread.

The gradient of a mean of squares, as RMS norms have it, is a number for each row, which autograd
spreads over the row, divides by its length and multiplies with twice each value: three passes over
the tokens. That number is divided and doubled before it is spread, which leaves one. The bits are
the same: a double is exact up to half of the greatest number. But steps between make what eager
PyTorch never makes, so a plan without replicas, whose steps are compared with eager's one by one,
keeps the three.
"""

# pyright: basic
# (fx nodes are not typed.)

from typing import Any

import torch
from torch import fx

from plait.compiler.rewrite import new_node, rewrite_joints
from plait.graph.graph import Graph, Module, Node

_EXPAND = torch.ops.aten.expand.default
_TIMES, _TIMES_NUMBER = torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar
_BY_NUMBER = (torch.ops.aten.div.Scalar, _TIMES_NUMBER)
_WIDE = (torch.float32, torch.float64, torch.bfloat16)
"""Of these half of the greatest number is out of reach; float16 ends at 65,504."""


def spread_late(graph: Graph) -> Graph:
    """Take numbers to before what they are multiplied with is spread, in every kind of piece."""
    return rewrite_joints(graph, _rewrite)


def _rewrite(joint: Module) -> bool:
    products = joint.graph.find_nodes(op="call_function", target=_TIMES)
    rewritten = [_spread_late(node) for node in products]
    return any(rewritten)


def _spread_late(node: Node) -> bool:
    """Let `expand(x) / n * 2y` be `expand(x / n * 2) * y`; False if its form would change."""
    for many, other in (node.args, node.args[::-1]):
        by_number = _by_number(many)
        expand = by_number.pop() if by_number else None
        is_twice = _is_twice(other)
        if expand is not None and (by_number or is_twice):
            break
    else:
        return False
    with node.graph.inserting_before(node):
        made = [expand.args[0]]
        for each in reversed(by_number):
            made.append(new_node(each, each.target, (made[-1], each.args[1])))
        if is_twice:
            made.append(new_node(many, _TIMES_NUMBER, (made[-1], 2.0)))
            other = other.args[0]
        made.append(new_node(many, _EXPAND, (made[-1], *expand.args[1:]), expand.kwargs))
        operands = (made[-1], other) if many is node.args[0] else (other, made[-1])
        made.append(new_node(node, _TIMES, operands))
    if made[-1].meta["val"].stride() != node.meta["val"].stride():
        for each in reversed(made[1:]):
            node.graph.erase_node(each)
        return False
    node.replace_all_uses_with(made[-1])
    _erase_unused(node)
    return True


def _by_number(x: Any) -> list[Node]:
    """Products and quotients with numbers of what is spread, the last first, and the spreading."""
    found: list[Node] = []
    while isinstance(x, fx.Node) and x.target in _BY_NUMBER:
        found.append(x)
        x = x.args[0]
    if not isinstance(x, fx.Node) or x.target is not _EXPAND:
        return []
    (few,) = x.all_input_nodes
    return [*found, x] if few.meta["val"].numel() < x.meta["val"].numel() else []


def _is_twice(x: Any) -> bool:
    if not isinstance(x, fx.Node) or x.target is not _TIMES_NUMBER:
        return False
    return bool(x.args[1] == 2) and x.meta["val"].dtype in _WIDE


def _erase_unused(node: Node) -> None:
    """Take out a node, and what nobody but it took."""
    stack = [node]
    while stack:
        each = stack.pop()
        if each.op == "call_function" and not each.users:
            stack += each.all_input_nodes
            each.graph.erase_node(each)
