"""The order of operators and collectives: what hides communication behind computation.

List scheduling of each kind of piece, once: a collective is launched as soon as its operand is
there, and is waited for just before its result is used; computation goes on with another replica,
or with weight gradients, which nothing in the piece waits for. Replicas go through the piece one
behind the other, by a skew that is tried out on the cost model. Costs come from a table, never from
a clock, so that every rank finds the same order.
"""

# pyright: basic
# (fx nodes are not typed.)

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from plait.compiler.group import cost_of_node, num_bytes
from plait.compiler.replicate_joint import PLACE, REPLICA
from plait.cost.clusters import Cluster, Link
from plait.cost.collectives import collective_of, collective_s
from plait.cost.operations import operation_s
from plait.cost.simulate import COMPUTE, Host, Operation, Simulation, communication
from plait.cost.skewed_schedule import Lane, skewed_schedule
from plait.graph.collectives import group_of, is_collective, is_wait
from plait.graph.graph import FORWARD, Graph, Module, Node, Role, Template, call_of, module_of
from plait.graph.partition import is_view
from plait.graph.random_nodes import is_random

FILLER_SHARE = 1 / 64
"""Of a device's memory: what waiting weight gradients may keep alive. On an H200 it is 2 GiB, the
operands of two or three layers of Llama 405B."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What an order is found for: the device, a link for each group, and how work is launched.

    filler_limit_bytes: what weight gradients that could run may keep alive, until one must.
    """

    cluster: Cluster
    links: dict[str, Link]
    sizes: dict[str, int]
    host: Host = Host.AHEAD
    filler_limit_bytes: int | None = None


def machine_of(graph: Graph, cluster: Cluster) -> Machine:
    """The machine as the graph's groups see it."""
    is_gpu = any(value.device.startswith("cuda") for value in graph.inputs)
    return Machine(
        cluster=cluster,
        links={name: cluster.link(name, size=group.size) for name, group in graph.groups.items()},
        sizes={name: group.size for name, group in graph.groups.items()},
        host=Host.AHEAD if is_gpu else Host.BLOCKING,
        filler_limit_bytes=round(FILLER_SHARE * cluster.device.memory_bytes),
    )


@dataclass(frozen=True)
class Ordered:
    """A module in its new order, and what the cost model says of it."""

    module: Module
    simulation: Simulation


def order(graph: Graph, cluster: Cluster) -> Graph:
    """Order every program of every kind of piece; the root stays as it is."""
    return order_pieces(graph, machine_of(graph, cluster))[0]


def order_pieces(graph: Graph, machine: Machine) -> tuple[Graph, dict[str, Ordered]]:
    """The graph in its new order, and what the cost model says of each program."""
    weights = weight_arguments(graph)
    found: dict[str, Ordered] = {}
    templates: dict[str, Template] = {}
    for template in graph.templates.values():
        forward = found[f"{template.name}.forward"] = order_module(template.forward, machine)
        new = templates[template.name] = replace(template, forward=forward.module)
        if template.backward is not None:
            fillers = fillers_of(template, weights.get(template.name, set()))
            backward = order_module(template.backward, machine, fillers)
            new.backward, found[f"{template.name}.backward"] = backward.module, backward
    return replace(graph, templates=templates), found


def order_module(module: Module, machine: Machine, fillers: Iterable[Node] = ()) -> Ordered:
    """Order one module by the best of several priorities. fillers: what nothing here waits for."""
    problem = _Problem(module, machine, set(fillers))
    best = skewed_schedule(
        problem.operations,
        problem.lanes(),
        host=machine.host,
        pinned_limit_bytes=machine.filler_limit_bytes,
        bytes_per_s=machine.cluster.device.memory_bandwidth_bytes_per_s,
    )
    return Ordered(problem.written(best.order), best)


class _Problem:
    """A module as operations: views and waits take no time and go where they are needed."""

    def __init__(self, module: Module, machine: Machine, fillers: set[Node]) -> None:
        self.module, self.machine, self.fillers = module, machine, fillers
        nodes = [node for node in module.graph.nodes if node.op == "call_function"]
        self.nodes = [node for node in nodes if not _is_free(node)]
        self.at = {node: i for i, node in enumerate(self.nodes)}
        self.operations = [self.operation(node) for node in self.nodes]
        self._chain_random()

    def operation(self, node: Node) -> Operation:
        depends_on = tuple(sorted({self.at[x] for x in self._sources(node)}))
        if is_collective(node):
            group = group_of(node)
            return Operation(
                node.name,
                communication(group),
                self._collective_s(node, group),
                depends_on,
            )
        pinned = 0
        if node in self.fillers:
            pinned = num_bytes(node.all_input_nodes)
        return Operation(node.name, COMPUTE, self._compute_s(node), depends_on, pinned)

    def _sources(self, node: Node) -> list[Node]:
        """The operations whose results the node needs, seen through views and waits."""
        found = []
        for source in node.all_input_nodes:
            if source in self.at:
                found.append(source)
            elif source.op == "call_function":
                found += self._sources(source)
        return found

    def _collective_s(self, node: Node, group: str) -> float:
        kind = collective_of(str(node.target))
        assert kind is not None, node.format_node()
        message_bytes = max(num_bytes([x]) for x in (node, *node.all_input_nodes))
        return collective_s(
            kind, message_bytes, self.machine.sizes[group], self.machine.links[group]
        )

    def _compute_s(self, node: Node) -> float:
        cost = cost_of_node(node)
        return 0.0 if cost is None else operation_s(cost, self.machine.cluster.device)

    def _chain_random(self) -> None:
        """Random operators draw in their order."""
        before: int | None = None
        for i, node in enumerate(self.nodes):
            if is_random(node):
                if before is not None:
                    each = self.operations[i]
                    self.operations[i] = replace(each, depends_on=(*each.depends_on, before))
                before = i

    def lanes(self) -> list[Lane]:
        """Where each operation belongs."""
        return [
            Lane(
                replica=node.meta.get(REPLICA),
                place=float(node.meta.get(PLACE, i)),
                is_filler=node in self.fillers,
            )
            for i, node in enumerate(self.nodes)
        ]

    def written(self, launches: Sequence[int]) -> Module:
        graph = fx.Graph()
        copies: dict[Node, Node] = {}

        def write(node: Node) -> None:
            stack = [node]
            while stack:
                top = stack[-1]
                missing = [x for x in top.all_input_nodes if x not in copies]
                if missing:
                    stack += missing
                    continue
                stack.pop()
                if top not in copies:
                    copies[top] = graph.node_copy(top, lambda x: copies[x])

        for node in self.module.graph.find_nodes(op="placeholder"):
            write(node)
        for i in launches:
            write(self.nodes[i])
        (outputs,) = self.module.graph.output_node().args
        for node in outputs:
            if isinstance(node, fx.Node):
                write(node)
        graph.output(fx.map_arg(outputs, lambda x: copies[x]))
        return module_of(self.module, graph)


def _is_free(node: Node) -> bool:
    return is_view(node) or is_wait(node) or not isinstance(node.target, torch._ops.OpOverload)


def weight_arguments(graph: Graph) -> dict[str, set[int]]:
    """Arguments of each template that are parameters in every call of it."""
    found: dict[str, set[int]] = {}
    for node in graph.root.graph.nodes:
        called = call_of(node)
        if called is None or called[1] != FORWARD:
            continue
        weights = {i for i, x in enumerate(node.args[2:]) if _is_weight(x)}
        found[called[0]] = found.get(called[0], weights) & weights
    return found


def _is_weight(node: object) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "placeholder"
        and node.meta["val"].role in (Role.PARAMETER, Role.BUFFER)
    )


def fillers_of(template: Template, weights: set[int]) -> set[Node]:
    """Nodes of the backward on which only gradients of weights rest."""
    assert template.backward is not None
    graph: Any = template.backward.graph
    wanted = [i for i, gradient in enumerate(template.gradients) if gradient is not None]
    outputs = graph.output_node().args[0]
    stack = [node for node, i in zip(outputs, wanted, strict=True) if i not in weights]
    stack += [node for node in graph.nodes if is_collective(node)]
    needed: set[Node] = set()
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    return {n for n in graph.nodes if n.op == "call_function" and n not in needed}


def estimated_s(graph: Graph, pieces: dict[str, Ordered]) -> float:
    """Time of the whole graph: that of each piece as often as it is called."""
    calls = filter(None, map(call_of, graph.root.graph.nodes))
    return sum(pieces[f"{name}.{part}"].simulation.total_s for name, part in calls)
