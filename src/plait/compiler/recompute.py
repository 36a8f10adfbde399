"""Recompute: what the backward of a block computes again instead of keeping it from the forward.

The same kernels run on the same values, so the numbers keep their bits. Random operators are never
run again: what they drew is kept.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator

import torch
from torch import fx

from plait.graph.collectives import is_collective, is_wait
from plait.graph.cut import BETWEEN
from plait.graph.graph import BACKWARD, FORWARD, Graph, Node, Role, Template, call_of
from plait.graph.partition import part_joint
from plait.plan.parallel_plan import Recompute


def recompute(graph: Graph, policy: Recompute) -> Graph:
    """Part the blocks anew by a policy. What stands between blocks is left as it is."""
    if policy is Recompute.NONE:
        return graph
    graph = graph.copy()
    for template in graph.templates.values():
        if template.joint is not None and template.block != BETWEEN:
            part_again(template, _chosen(template.joint, policy))
    root = graph.root
    for node in list(root.graph.nodes):
        call = call_of(node)
        if call is not None and call[1] == BACKWARD:
            pass_saved(node, graph.templates[call[0]])
    drop_unused_parts(root)
    return graph


def drop_unused_parts(root: fx.GraphModule) -> None:
    """Forget parts of calls that nobody takes any more."""
    for node in reversed(list(root.graph.nodes)):
        if node.target is operator.getitem and not node.users:
            root.graph.erase_node(node)
    root.recompile()


def _chosen(joint: fx.GraphModule, policy: Recompute) -> set[str]:
    chosen = set()
    for node in joint.graph.nodes:
        if node.op != "call_function" or _must_keep(node):
            continue
        if policy is Recompute.FULL or _is_cheap(node):
            chosen.add(node.name)
    return chosen


def _must_keep(node: Node) -> bool:
    if node.target is operator.getitem:
        return _must_keep(node.args[0])
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags or is_collective(node) or is_wait(node)


def _is_cheap(node: Node) -> bool:
    """Pointwise operators read and write each value once: the cheapest bytes to get back."""
    if node.target is operator.getitem:
        return _is_cheap(node.args[0])
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target is torch.ops.aten._to_copy.default


def part_again(template: Template, names: set[str]) -> None:
    """Part a template anew. names: forward operators that the backward runs again."""
    assert template.joint is not None
    parts = part_joint(
        template.joint,
        num_arguments=len(template.arguments),
        num_results=len(template.results),
        recompute=names,
    )
    template.forward, template.backward = parts.forward, parts.backward
    template.saved = parts.saved


def pass_saved(backward: fx.Node, template: Template) -> None:
    """Let a backward call take what its template saves now."""
    forward = backward.meta["forward"]
    num_tangents = len(template.differentiable) + len(template.threaded)
    tangents = backward.args[len(backward.args) - num_tangents :]
    position = len(template.results)
    saved = []
    graph = backward.graph
    for value in template.saved:
        if value.role is Role.INPUT:
            saved.append(forward.args[2 + int(value.name)])
            continue
        with graph.inserting_after(forward):
            part = graph.call_function(operator.getitem, (forward, position))
        part.meta["val"] = value
        saved.append(part)
        position += 1
    backward.args = (template.name, BACKWARD, *saved, *tangents)
    assert call_of(forward) == (template.name, FORWARD)
