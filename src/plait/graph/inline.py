"""Regions put back where they were: a module for those who do not know of blocks."""

# pyright: basic
# (fx nodes are not typed.)

import operator

import torch
from torch import fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

from plait.graph.graph import Module, Node


def inline_regions(module: Module) -> None:
    """Replace each region by its nodes.

    Who runs the module afterwards calls `recompile` first, which writes its Python code.
    """
    for node in calls_of_regions(module):
        inline_region(module, node)


def calls_of_regions(module: Module) -> list[Node]:
    """Calls of regions, in order."""
    return [node for node in module.graph.nodes if node.target is invoke_subgraph]


def inline_region(module: Module, node: Node) -> None:
    """Replace one call of a region by the nodes of the region."""
    attribute, graph = node.args[0], node.graph
    region = getattr(module, attribute.target)
    inner = dict(zip(region.graph.find_nodes(op="placeholder"), node.args[2:], strict=True))
    with graph.inserting_before(node):
        for source in region.graph.nodes:
            if source.op in ("placeholder", "output"):
                continue
            if source.target == "item" and _is_number(inner[source.args[0]]):
                inner[source] = inner[source.args[0]]  # a number that Dynamo had boxed
                continue
            copy = graph.node_copy(source, lambda x: inner[x])
            if source.op in ("get_attr", "call_module"):
                copy.target = _adopt(module, region, source.target)
            inner[source] = copy
        results = fx.map_arg(region.graph.output_node().args[0], lambda x: inner[x])
    for user in list(node.users):
        assert user.target is operator.getitem, user.format_node()
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)
    if not attribute.users:
        graph.erase_node(attribute)


def _is_number(operand: object) -> bool:
    value = operand.meta.get("example_value") if isinstance(operand, fx.Node) else operand
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat)


def _adopt(module: Module, region: Module, target: str) -> str:
    value = operator.attrgetter(target)(region)
    name = f"{target}_of_block".replace(".", "_")
    while hasattr(module, name) and getattr(module, name) is not value:
        name += "_"
    setattr(module, name, value)
    return name
