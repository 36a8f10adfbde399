"""Causal attention's backward on a CPU takes a kernel that multiplies by the CPU's units."""

# pyright: basic
# (fx nodes are not typed.)

from typing import Any

import torch
from torch import fx

from plait.compiler.rewrite import rewrite_joints
from plait.graph.graph import Graph, Module, Node
from plait.ops import flash_backward

_PYTORCHS = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def quicken_attention(graph: Graph) -> Graph:
    """Put `plait::flash_backward` in the place of PyTorch's operator wherever it serves."""
    return rewrite_joints(graph, _quicken)


def _quicken(joint: Module) -> bool:
    graph: Any = joint.graph
    found = [
        node
        for node in graph.find_nodes(op="call_function", target=_PYTORCHS, sort=True)
        if _is_served(node)
    ]
    for node in found:
        dout, q, k, v, out, logsumexp, *_ = node.args
        scale = node.kwargs.get("scale")
        scale = q.meta["val"].shape[-1] ** -0.5 if scale is None else scale
        with graph.inserting_before(node):
            operands = (dout, q, k, v, out, logsumexp, scale)
            new = graph.call_function(torch.ops.plait.flash_backward.default, operands)
        new.meta = dict(node.meta)
        new.meta["val"] = new.target(*fx.map_arg(operands, lambda x: x.meta["val"]))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return bool(found)


def _is_served(node: Node) -> bool:
    _, q, k, _, _, _, dropout, is_causal = node.args
    is_plain = is_causal and not dropout and node.kwargs.get("attn_mask") is None
    return is_plain and flash_backward.serves(q.meta["val"], k.meta["val"])
