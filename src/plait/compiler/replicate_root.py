"""The root of a graph in replicas: each call calls the template that was written for its use."""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from plait.compiler.replicate_joint import Parts
from plait.compiler.token_moves import Tokens
from plait.graph.graph import (
    BACKWARD,
    FORWARD,
    Graph,
    Node,
    Role,
    Template,
    Value,
    call,
    call_of,
    module_of,
)


@dataclass(frozen=True)
class Use:
    """How a call uses its template: tokens of its arguments, and what passes in parts."""

    template: str
    parts: Parts
    tokens: tuple[Tokens | None, ...]
    arguments_in_parts: tuple[bool, ...]
    results_in_parts: tuple[bool, ...]


def write_root(graph: Graph, uses: Mapping[Node, Use], templates: Mapping[Use, Template]) -> Graph:
    """Write the root anew. uses: by forward call."""
    return _RootWriter(graph, uses, templates).write()


def repeated(items: Sequence[int], in_parts: Sequence[bool], count: int) -> list[int]:
    """The items, those in parts once for each part."""
    return [
        i
        for i, is_parted in zip(items, in_parts, strict=True)
        for _ in range(count if is_parted else 1)
    ]


class _RootWriter:
    def __init__(
        self, old: Graph, uses: Mapping[Node, Use], templates: Mapping[Use, Template]
    ) -> None:
        self.old, self.uses, self.templates = old, uses, templates
        self.graph = fx.Graph()
        self.at: dict[Node, list[Node]] = {}
        self.calls: dict[Node, Node] = {}

    def write(self) -> Graph:
        for node in self.old.root.graph.nodes:
            called = call_of(node)
            if called is not None and called[1] == FORWARD:
                self.forward(node)
            elif called is not None:
                self.backward(node)
            elif node.op in ("placeholder", "get_attr"):
                self.at[node] = [self.graph.node_copy(node)]
        outputs: Any = self.old.root.graph.output_node().args[0]
        self.graph.output(tuple(self.single(x) for x in outputs))
        templates = {each.name: each for each in self.templates.values()}
        return replace(self.old, root=module_of(self.old.root, self.graph), templates=templates)

    def single(self, node: Node) -> Node:
        (only,) = self.at[node]
        return only

    def forward(self, node: Node) -> None:
        use = self.uses[node]
        template = self.templates[use]
        operands = [x for source in node.args[2:] for x in self.at[source]]
        new = self.calls[node] = self.call(template, FORWARD, operands)
        old = self.old.templates[use.template]
        users = {user.args[1]: user for user in node.users}
        count = len(use.parts.sizes)
        positions = repeated(range(len(old.results)), use.results_in_parts, count)
        for at, i in enumerate(positions):
            if i in users:
                part = self.part(new, at, template.results[at])
                self.at.setdefault(users[i], []).append(part)

    def backward(self, node: Node) -> None:
        forward = node.meta["forward"]
        use = self.uses[forward]
        template, old = self.templates[use], self.old.templates[use.template]
        new_forward = self.calls[forward]
        num_tangents = len(old.differentiable) + len(old.threaded)
        tangents = [x for t in node.args[len(node.args) - num_tangents :] for x in self.at[t]]
        computed = iter(range(len(template.results), len(template.yields(FORWARD))))
        saved = []
        for value in template.saved:
            if value.role is Role.INPUT:
                saved.append(new_forward.args[2 + int(value.name)])
            else:
                saved.append(self.part(new_forward, next(computed), value))
        new = self.call(template, BACKWARD, [*saved, *tangents])
        new.meta["forward"] = new_forward
        users = {user.args[1]: user for user in node.users}
        wanted = [i for i, gradient in enumerate(old.gradients) if gradient is not None]
        in_parts = [use.arguments_in_parts[i] for i in wanted]
        gradients = template.yields(BACKWARD)
        count = len(use.parts.sizes)
        for at, i in enumerate(repeated(range(len(wanted)), in_parts, count)):
            if i in users:
                value = users[i].meta["val"] if not in_parts[i] else gradients[at]
                self.at.setdefault(users[i], []).append(self.part(new, at, value))

    def call(self, template: Template, part: str, operands: Sequence[Node]) -> Node:
        name = f"{template.name}_{part}".lower()
        return self.graph.create_node(
            "call_function", call, (template.name, part, *operands), name=name
        )

    def part(self, node: Node, i: int, value: Value) -> Node:
        part = self.graph.call_function(operator.getitem, (node, i))
        part.meta["val"] = value
        return part
