"""What the forward keeps for the backward when operators run as islands: as few bytes as possible.

An operator that an island of the backward can hold costs next to nothing there, so what it made
need not be kept, if what it was made of is. Which values to keep is a minimum cut between what only
the forward can compute and what the backward needs, as in AOTAutograd's partitioner
[He and Yu 2023, "Transcending Runtime-Memory Tradeoffs in Checkpointing", MLSys].
"""

# pyright: basic
# (fx nodes and networkx are not typed.)

import operator
from collections.abc import Mapping

import networkx
from torch import fx

from plait.compiler.fusible import is_fusible
from plait.compiler.group import num_bytes, sources
from plait.compiler.order import weight_arguments
from plait.compiler.rewrite import part_again, pass_saved
from plait.graph.graph import Graph, Module, Node, Template
from plait.graph.island import looks_only, root_of
from plait.graph.partition import backward_nodes
from plait.plan.parallel_plan import Recompute

_REDUCED = 4
"""What is this many times smaller than its operands is kept: it costs little, and a sum is not
computed twice."""


def save_less(graph: Graph, policy: Recompute) -> Graph:
    """Part every template anew, so that it keeps less. A policy of the plan goes before."""
    if policy is not Recompute.NONE:
        return graph
    graph = graph.copy()
    weights = weight_arguments(graph)
    for template in graph.templates.values():
        if template.joint is not None:
            names = _computed_again(template, weights.get(template.name, set()))
            part_again(template, recompute=names)
    pass_saved(graph)
    return graph


def _computed_again(template: Template, weights: set[int]) -> set[str]:
    """Names of the operators of the forward that the backward runs again."""
    assert template.joint is not None
    nodes = list(template.joint.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    arguments = placeholders[: len(template.arguments)]
    backward = backward_nodes(nodes, placeholders[len(arguments) :])
    free = {arguments[i] for i in weights}
    network = networkx.DiGraph()
    network.add_nodes_from(("source", "sink"))
    forward = [
        node
        for node in nodes
        if node not in backward and node.op != "output" and not looks_only(node)
    ]
    for node in forward:
        if not _can_run_again(node, backward):
            network.add_edge("source", ("in", node))  # no capacity: not to be cut
        if isinstance(node.meta.get("val"), tuple | list):
            network.add_edge(("in", node), ("out", node))
        else:
            size = 0 if node in free else num_bytes([node]) * _weight(node)
            network.add_edge(("in", node), ("out", node), capacity=size)
        for source in sources(node):
            network.add_edge(("out", source), ("in", node))
    for node in _needed(nodes, backward, template):
        network.add_edge(("out", node), "sink")
    _, (_, behind) = networkx.minimum_cut(network, "source", "sink")
    return {node.name for node in forward if ("in", node) in behind}


def _needed(nodes: list[Node], backward: set[Node], template: Template) -> set[Node]:
    """What the backward takes of the forward, and gradients that the forward has computed."""
    found = {x for node in nodes if node in backward for x in sources(node)}
    joint: Module = template.joint
    (outputs,) = joint.graph.output_node().args
    gradients = outputs[len(template.results) :]
    found |= {root_of(node) for node in gradients if isinstance(node, fx.Node)}
    return found - backward


def _can_run_again(node: Node, backward: set[Node]) -> bool:
    if not is_fusible(node) or node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True  # where its operator can
    if num_bytes([node]) * _REDUCED < num_bytes(sources(node)):
        return False
    return not _is_operand_outside(node, backward)


def _is_operand_outside(node: Node, backward: Mapping | set[Node]) -> bool:
    """Whether an operator of the backward that stands alone takes the value from memory."""
    for user in node.users:
        if looks_only(user):
            if _is_operand_outside(user, backward):
                return True
        elif user in backward and (user.op == "output" or not is_fusible(user)):
            return True
    return False


def _weight(node: Node) -> int:
    """A value that would else stay within an island has to be written to be kept."""
    users = [user for user in node.users if not looks_only(user)]
    stays = is_fusible(node) and bool(users) and all(is_fusible(user) for user in users)
    return 2 if stays else 1
