"""Fewer collectives for the same sums.

Products that share an input (query, key and value; gate and up) each send back their part of its
gradient, and DTensor sums each of them over the ranks: one sum of the parts is enough. And of a sum
over ranks of which every rank keeps its own share, only the shares need to travel.

Sums are taken in another order, so numbers change within the tolerance of the dtype; every later
pass is compared with the merged graph.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

import plait.graph.exchange as _registers_own_part  # noqa: F401
from plait.compiler.rewrite import new_node, rewrite_joints
from plait.graph.collectives import group_of, is_collective, is_wait
from plait.graph.graph import Graph, Group, Module, Node
from plait.graph.note import Note

NAME = "merge collectives"
_aten = torch.ops.aten
_c10d = torch.ops._c10d_functional


def merge(graph: Graph) -> Graph:
    """Merge the all-reduces of each kind of piece; the graph's notes say how many."""
    num_merged = num_scattered = 0

    def rewrite(joint: Module) -> bool:
        nonlocal num_merged, num_scattered
        merged, scattered = merge_joint(joint, graph.groups)
        num_merged, num_scattered = num_merged + merged, num_scattered + scattered
        return merged + scattered > 0

    rewritten = rewrite_joints(graph, rewrite)
    notes = [
        Note(by=NAME, operator="all_reduce", node=text, text=text, count=count)
        for text, count in (
            ("their sum is reduced instead of each", num_merged),
            ("each rank's share is scattered", num_scattered),
        )
        if count
    ]
    return replace(rewritten, notes=(*graph.notes, *notes))


def merge_joint(joint: Module, groups: dict[str, Group]) -> tuple[int, int]:
    """Merge in place; returns the numbers of all-reduces merged, and made reduce-scatters."""
    _drop_empty_views(joint)
    num_merged = sum(
        _merge_sum(node)
        for node in list(joint.graph.nodes)
        if node.target is _aten.add.Tensor and not node.kwargs
    )
    num_scattered = sum(
        _scatter(node, groups)
        for node in list(joint.graph.nodes)
        if node.target is _c10d.all_reduce.default
    )
    if num_merged or num_scattered:
        _drop_unused(joint)
    return num_merged, num_scattered


def _drop_unused(joint: Module) -> None:
    """Forget what nobody needs, messages too (fx keeps them)."""
    for node in reversed(list(joint.graph.nodes)):
        is_message = is_collective(node) or is_wait(node)
        if node.op == "call_function" and not node.users and (is_message or not node.is_impure()):
            joint.graph.erase_node(node)
    joint.recompile()


def _drop_empty_views(joint: Module) -> None:
    for node in joint.graph.find_nodes(op="call_function", target=_aten.view.default):
        before, after = node.args[0].meta["val"], node.meta["val"]
        if before.shape == after.shape and before.stride() == after.stride():
            node.replace_all_uses_with(node.args[0])
            joint.graph.erase_node(node)


def _reduced(node: Any) -> Node | None:
    """The all-reduce whose result is the node, if nobody else sees it."""
    if not isinstance(node, fx.Node) or not is_wait(node) or len(node.users) != 1:
        return None
    source: Any = node.args[0]
    is_sum = source.target is _c10d.all_reduce.default and source.args[1] == "sum"
    return source if is_sum and len(source.users) == 1 else None


def _merge_sum(node: Node) -> bool:
    """all_reduce(a) + all_reduce(b) = all_reduce(a + b)."""
    left, right = (_reduced(x) for x in node.args[:2])
    if left is None or right is None or node.args[0] is node.args[1]:
        return False
    if (
        group_of(left) != group_of(right)
        or node.args[0].meta["val"].shape != node.meta["val"].shape
    ):
        return False
    if node.args[1].meta["val"].shape != node.meta["val"].shape:
        return False
    graph = node.graph
    with graph.inserting_before(node):
        total = new_node(node, _aten.add.Tensor, (left.args[0], right.args[0]))
        reduced = new_node(node, left.target, (total, *left.args[1:]))
        waited = new_node(node, _c10d.wait_tensor.default, (reduced,))
    node.replace_all_uses_with(waited)
    for each in (node, node.args[0], left, node.args[1], right):
        if not each.users:
            graph.erase_node(each)
    return True


def _scatter(node: Node, groups: dict[str, Group]) -> bool:
    """An all-reduce of which each rank keeps its share is a reduce-scatter."""
    group = groups.get(group_of(node))
    wait = next(iter(node.users))
    if group is None or node.args[1] != "sum" or len(node.users) != 1 or len(wait.users) != 1:
        return False
    kept = _own_share(next(iter(wait.users)), group, group_of(node))
    if kept is None:
        return False
    dim, taken = kept
    graph = node.graph
    with graph.inserting_before(node):
        source = node.args[0]
        if dim:
            size = source.meta["val"].shape[dim] // group.size
            pieces = new_node(node, _aten.split.Tensor, (source, size, dim))
            parts = [new_node(node, operator.getitem, (pieces, i)) for i in range(group.size)]
            source = new_node(node, _aten.cat.default, (parts,))
        args = (source, "sum", group.size, group_of(node))
        scattered = new_node(node, _c10d.reduce_scatter_tensor.default, args)
        waited = new_node(node, _c10d.wait_tensor.default, (scattered,))
    taken.replace_all_uses_with(waited)
    return True


def _own_share(node: Node, group: Group, name: str) -> tuple[int, Node] | None:
    """The dim along which a rank keeps its own share, and the node that is that share."""
    if node.target is torch.ops.plait.own_part.default:
        dim, size, _, own_name = node.args[1:]
        found = (dim % node.args[0].meta["val"].dim(), node)
        return found if (size, own_name) == (group.size, name) else None
    if node.target is not _aten.split.Tensor or len(node.meta["val"]) != group.size:
        return None
    kept = [user for user in node.users if user.users]
    is_even = len({part.shape for part in node.meta["val"]}) == 1
    if len(kept) != 1 or kept[0].args[1] != group.rank or not is_even:
        return None
    dim = node.args[2] if len(node.args) > 2 else 0
    return dim % node.args[0].meta["val"].dim(), kept[0]
