"""A joint graph parted into forward and backward, and what is kept between them.

What the backward uses of the forward is either saved, or computed again from what is saved. Views
are always computed again: what they look at is kept in memory in either case.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from plait.graph.graph import Module, Node, Role, Value, describe, module_of
from plait.graph.random_nodes import is_random


@dataclass(frozen=True)
class Parts:
    """Modules of the two halves; forward yields results, then the computed ones of `saved`."""

    forward: Module
    backward: Module
    saved: tuple[Value, ...]


def part_joint(
    joint: Module,
    *,
    num_arguments: int,
    num_results: int,
    recompute: Collection[str] = (),
) -> Parts:
    """Part a joint graph of arguments and tangents into forward and backward.

    num_results: how many of the outputs are the forward's; the others are gradients, or None.
    recompute: names of forward nodes that the backward computes again.
    """
    nodes = list(joint.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    arguments, tangents = placeholders[:num_arguments], placeholders[num_arguments:]
    (outputs,) = joint.graph.output_node().args
    results, gradients = outputs[:num_results], outputs[num_results:]
    again = _computed_again(nodes, recompute)
    is_backward = backward_nodes(nodes, tangents)
    backward_order = _needed_by(
        [node for node in gradients if node is not None], is_backward | again
    )
    given_later, wanted = set(tangents), set(gradients)
    saved = [
        node
        for node in nodes
        if node.op != "output"
        and node not in backward_order
        and node not in given_later
        and (node in wanted or any(user in backward_order for user in node.users))
    ]
    arguments_at = {node: i for i, node in enumerate(arguments)}
    computed = [node for node in saved if node not in arguments_at]
    return Parts(
        forward=extract(joint, nodes, arguments, [*results, *computed]),
        backward=extract(
            joint,
            [node for node in nodes if node in backward_order],
            [*saved, *tangents],
            [node for node in gradients if node is not None],
        ),
        saved=tuple(
            describe(Role.INPUT, str(arguments_at[node]), node.meta["val"])
            if node in arguments_at
            else describe(Role.SAVED, node.name, node.meta["val"])
            for node in saved
        ),
    )


def is_view(node: Node) -> bool:
    """Say whether the node only looks at another node's memory in its own way."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return is_view(node.args[0])
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.is_view
        and not target._schema.is_mutable
    )


def extract_forward(module: Module) -> Module:
    """A graph without gradients, without what nobody needs."""
    inputs = module.graph.find_nodes(op="placeholder")
    (outputs,) = module.graph.output_node().args
    return extract(module, list(module.graph.nodes), inputs, outputs)


def backward_nodes(nodes: list[Node], tangents: list[Node]) -> set[Node]:
    """AOTAutograd marks them; what depends on a tangent is one in any case."""
    found = set(tangents)
    for node in nodes:
        if node.op in ("call_function", "get_attr") and (
            node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")
            or any(source in found for source in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _computed_again(nodes: list[Node], recompute: Collection[str]) -> set[Node]:
    return {
        node for node in nodes if node.op == "get_attr" or node.name in recompute or is_view(node)
    }


def _needed_by(wanted: list[Node], allowed: set[Node]) -> set[Node]:
    """The allowed nodes on which the wanted ones rest, without going through others."""
    found: set[Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node in allowed and node not in found and node.op != "placeholder":
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def extract(joint: Module, nodes: list[Node], inputs: list[Node], outputs: list[Node]) -> Module:
    """The part of a graph that leads from inputs to outputs; what draws random numbers is kept."""
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    needed = _needed_by([*outputs, *filter(is_random, nodes)], set(nodes) - set(inputs))
    for node in nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[node] for node in outputs))
    return module_of(joint, graph)
