"""Recompute: what the backward of a block computes again instead of keeping it from the forward.

"selective" weighs cost against bytes: it computes again what is bound by memory and moves few bytes
for each that need not be kept; products and attention are kept. The same kernels run on the same
values, so the numbers keep their bits. Random operators are never run again: what they drew is
kept. "alternate" is what torchtitan's per-operator checkpointing does
[torchtitan/parallelisms/parallelize_llama.py at 004b3148, _get_custom_policy].
"""

# pyright: basic
# (fx nodes are not typed.)

import operator

import torch
from torch import fx

from plait.compiler.group import cost_of_node, num_bytes
from plait.compiler.rewrite import part_again, pass_saved
from plait.cost.operations import Kind
from plait.graph.collectives import is_collective, is_wait
from plait.graph.cut import BETWEEN
from plait.graph.graph import Graph, Node
from plait.graph.random_nodes import is_random
from plait.plan.parallel_plan import Recompute


def recompute(graph: Graph, policy: Recompute) -> Graph:
    """Part the blocks anew by a policy. What stands between blocks is left as it is."""
    if policy is Recompute.NONE:
        return graph
    graph = graph.copy()
    for template in graph.templates.values():
        if template.joint is not None and template.block != BETWEEN:
            part_again(template, recompute=_chosen(template.joint, policy))
    pass_saved(graph)
    return graph


def _chosen(joint: fx.GraphModule, policy: Recompute) -> set[str]:
    chosen = set()
    num_products = 0
    for node in joint.graph.nodes:
        if node.op != "call_function" or _must_keep(node):
            continue
        num_products += node.target in _PRODUCTS
        is_kept = _is_attention(node) or (node.target in _PRODUCTS and num_products % 2)
        if (
            policy is Recompute.FULL
            or (policy is Recompute.ALTERNATE and not is_kept)
            or _is_cheap(node)
        ):
            chosen.add(node.name)
    return chosen


_MOVED = 4
"""Bytes that an operator may move for each byte of its result: a pointwise one with three operands
does, or a norm, and a sum over rows moves many more."""
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _is_attention(node: Node) -> bool:
    if node.target is operator.getitem:
        return _is_attention(node.args[0])
    return "attention" in str(node.target)


def _must_keep(node: Node) -> bool:
    if node.target is operator.getitem:
        return _must_keep(node.args[0])
    return is_random(node) or is_collective(node) or is_wait(node)


def _is_cheap(node: Node) -> bool:
    """Whether it costs little to make the bytes of a result again."""
    if node.target is operator.getitem:
        return _is_cheap(node.args[0])
    cost = cost_of_node(node)
    if cost is None or cost.kind is not Kind.MEMORY:
        return False
    return cost.bytes <= _MOVED * num_bytes([node])
