"""Level O1: neighbouring operators become islands, each compiled once (see `graph/island.py`).

The last pass, after `order`: what it finds is an order of operators and collectives, and it leaves
every collective where it stands. `verify_fused` proves this of each module that was changed.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from plait.compiler.group import group, sources
from plait.compiler.verify_fused import verify_fused
from plait.graph.graph import Graph, Module, Node, Role, Value, describe, module_of
from plait.graph.island import Island, island, looks_only, name_by_content
from plait.graph.note import Note


def fuse(graph: Graph) -> Graph:
    """Put islands into every program of every template; what stands between them is left."""
    graph = graph.copy()
    islands = dict(graph.islands)
    for template in graph.templates.values():
        template.forward = fuse_module(template.forward, islands)
        if template.backward is not None:
            template.backward = fuse_module(template.backward, islands)
    graph.islands = islands
    return graph


def fuse_module(module: Module, islands: dict[str, Island]) -> Module:
    """The module with islands in place of groups of operators; new ones are added to `islands`."""
    groups = group(module)
    if not groups:
        return module
    fused = _Writer(module, groups, islands).written()
    verify_fused(module, fused, islands)
    return fused


def refuse_islands(graph: Graph) -> Graph:
    """Say why there are no islands: with strict numerics a fused kernel would not be exact."""
    note = Note(
        by="islands",
        operator="every operator",
        node="the graph",
        text="strict numerics: a fused kernel rounds a row by its place in a vector, so O0's run",
        is_refusal=True,
    )
    graph = graph.copy()
    graph.notes = (*graph.notes, note)
    return graph


class _Writer:
    """A module anew: nodes in their order, an island at its last member or where it is needed."""

    def __init__(self, module: Module, groups: Sequence[list[Node]], islands: dict) -> None:
        self.module, self.islands = module, islands
        self.members = {node: i for i, members in enumerate(groups) for node in members}
        self.groups = groups
        self.last = {i: members[-1] for i, members in enumerate(groups)}
        self.graph = fx.Graph()
        self.copies: dict[Node, Node] = {}
        self.is_written = [False] * len(groups)

    def written(self) -> Module:
        for node in self.module.graph.find_nodes(op="placeholder"):
            self.copy(node)
        for node in self.module.graph.nodes:
            number = self.members.get(node)
            if node.op in ("placeholder", "output") or looks_only(node):
                continue
            if number is None:
                self.write(node)
            elif self.last[number] is node:
                self.write_group(number)
        (outputs,) = self.module.graph.output_node().args
        for node in outputs:
            if isinstance(node, fx.Node):
                self.write(node)
        self.graph.output(fx.map_arg(outputs, lambda x: self.copies[x]))
        return module_of(self.module, self.graph)

    def write(self, node: Node) -> None:
        """Write a node after what it needs."""
        stack = [node]
        while stack:
            top = stack[-1]
            number = self.members.get(top)
            missing = [x for x in self.needed(top, number) if x not in self.copies]
            if missing:
                stack += missing
                continue
            stack.pop()
            if top in self.copies:
                continue
            if number is None:
                self.copy(top)
            else:
                self.write_island(number)

    def write_group(self, number: int) -> None:
        if not self.is_written[number]:
            self.write(self.groups[number][0])

    def needed(self, node: Node, number: int | None) -> list[Node]:
        if number is None:
            return list(node.all_input_nodes)
        if self.is_written[number]:
            return []
        return self.operands(number)

    def operands(self, number: int) -> list[Node]:
        inside = set(self.groups[number])
        found = [x for node in self.groups[number] for x in _tensors(node, inside)]
        return list(dict.fromkeys(found))

    def copy(self, node: Node) -> None:
        self.copies[node] = self.graph.node_copy(node, lambda x: self.copies[x])

    def write_island(self, number: int) -> None:
        """Write the island, and a part of its tuple for each member that others see."""
        members, operands = self.groups[number], self.operands(number)
        inside = set(members)
        seen = [node for node in members if _is_seen(node, inside)]
        found = cut_out(members, operands, seen)
        known = self.islands.setdefault(found.name, found)
        args = (known.name, *(self.copies[x] for x in operands))
        whole: Any = self.graph.call_function(island, args)
        whole.meta["val"] = tuple(node.meta["val"] for node in seen)
        whole.meta["stack_trace"] = members[-1].meta.get("stack_trace")
        for i, node in enumerate(seen):
            part: Any = self.graph.call_function(operator.getitem, (whole, i))
            part.meta = dict(node.meta)
            self.copies[node] = part
        for node in members:
            self.copies.setdefault(node, whole)  # seen by nobody outside
        self.is_written[number] = True


def cut_out(members: Sequence[Node], operands: Sequence[Node], seen: Sequence[Node]) -> Island:
    """An island of its own: the members, the views among them, and the forms of the operands."""
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    takes: list[Value] = []
    for i, node in enumerate(operands):
        copies[node] = graph.placeholder(f"given_{i}")
        copies[node].meta["val"] = node.meta["val"]
        takes.append(describe(Role.INPUT, str(i), node.meta["val"]))
    lines = [f"{each.shape} {each.stride} {each.dtype} {each.device}" for each in takes]

    def write(node: Node) -> None:
        for source in node.all_input_nodes:
            if source not in copies:
                write(source)
        target = node.target if node.target is operator.getitem else str(node.target)
        copy: Any = graph.create_node(
            "call_function",
            node.target,
            fx.map_arg(node.args, lambda x: copies[x]),
            fx.map_arg(node.kwargs, lambda x: copies[x]),
            name=f"value_{len(copies)}",
        )
        copy.meta["val"] = node.meta["val"]
        copies[node] = copy
        lines.append(f"{copy.name} = {target} {copy.args} {copy.kwargs}")

    for node in members:
        write(node)
    results = tuple(copies[node] for node in seen)
    graph.output(results)
    lines.append(f"return {results}")
    name = name_by_content("\n".join(lines))
    return Island(name, module_of(torch.nn.Module(), graph), tuple(takes))


def _tensors(node: Node, inside: set[Node]) -> Iterable[Node]:
    """What an island takes for a member: the roots of its operands, but those made inside."""
    return [x for x in sources(node) if x not in inside]


def _is_seen(node: Node, inside: set[Node]) -> bool:
    """Whether the member, or a view of it, is used outside."""
    return any(
        _is_seen(user, inside) if looks_only(user) else user not in inside for user in node.users
    )
