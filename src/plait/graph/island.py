"""Islands: neighbouring operators that run as one fused kernel, and where they stand in a graph.

An island is written once, by its structure and the forms of what it takes, however often it recurs.
In a module it is one node that yields a tuple; `expanded` puts the operators back in its place.
"""

# pyright: basic
# (fx nodes are not typed.)

import hashlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from plait.graph.graph import Module, Node, Value, module_of
from plait.graph.partition import is_view


@dataclass(frozen=True)
class Island:
    """Operators without side effects, as a module, and the forms of the tensors that it takes."""

    name: str
    module: Module
    takes: tuple[Value, ...]
    mode: str = ""  # of the kernel's making: "" or "max-autotune"

    @property
    def num_operators(self) -> int:
        """Operators that compute; views and parts of tuples are not counted."""
        return sum(is_computing(node) for node in self.module.graph.nodes)


def island(name: str, *operands: object) -> tuple[object, ...]:
    """Stand in a graph for the island of that name."""
    raise AssertionError(f"the island {name} stands in a graph only")


def island_of(node: Node) -> str | None:
    """Name of the island that the node runs, else None."""
    if node.op == "call_function" and node.target is island:
        return str(node.args[0])
    return None


def looks_only(node: Node) -> bool:
    """Whether the node only sees another's memory in its own way."""
    return is_view(node) or node.target is torch.ops.aten._unsafe_view.default


def root_of(node: Node) -> Node:
    """The node whose memory is seen, through views."""
    while looks_only(node):
        node = node.args[0]
    return node


def is_computing(node: Node) -> bool:
    """Whether the node is an operator that makes memory of its own."""
    is_part = node.target is operator.getitem
    return node.op == "call_function" and not is_part and not looks_only(node)


def name_by_content(text: str) -> str:
    """Name of an island, from a text that equal islands share."""
    return "island_" + hashlib.sha256(text.encode()).hexdigest()[:16]


def expanded(module: Module, islands: Mapping[str, Island]) -> Module:
    """The module with every island's operators in its place."""
    graph = fx.Graph()
    copies: dict[Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            break
        name = island_of(node)
        if name is not None:
            copies[node] = _inlined(graph, islands[name], [copies[x] for x in node.args[1:]])
        elif node.target is operator.getitem and isinstance(copies[node.args[0]], tuple):
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = graph.node_copy(node, lambda x: copies[x])
    (outputs,) = module.graph.output_node().args
    graph.output(fx.map_arg(outputs, lambda x: copies[x]))
    return module_of(module, graph)


def _inlined(graph: fx.Graph, found: Island, operands: list) -> tuple:
    copies = dict(zip(found.module.graph.find_nodes(op="placeholder"), operands, strict=True))
    (results,) = found.module.graph.output_node().args
    for node in found.module.graph.nodes:
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, lambda x: copies[x])
    return tuple(copies[x] for x in results)
