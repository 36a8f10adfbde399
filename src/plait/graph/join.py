"""Calls of several templates, one after the other, as one template.

A piece that spans several attentions (`cut.py`) is traced from one attention to the next, so that
equal layers are traced once, and put together here: the forward of the first, of the second, ...,
then the backward of the last, and so on back. What one hands to the next stays inside.
"""

# pyright: basic
# (fx nodes are not typed.)

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import fx

from plait.graph.graph import Module, Node, Role, Template, Value, describe, module_of
from plait.graph.partition import backward_nodes, part_joint

_WRITTEN = ("call_function", "get_attr")


@dataclass(frozen=True)
class Wire:
    """What a call takes and yields: values of the program, by which calls are known to be wired."""

    template: Template
    operands: tuple[Node, ...]
    results: tuple[Node, ...]


@dataclass
class Joined:
    """Calls as one: what it takes of outside, and what is taken of it there.

    arriving: results for which gradients arrive from outside. threaded: operands that add their
    gradient to one that arrives from there (see `Template`).
    """

    wires: Sequence[Wire]
    operands: list[Node]
    results: list[Node]
    arriving: list[Node]
    threaded: list[Node]

    @property
    def key(self) -> tuple:
        """Equal for calls of equal templates that are wired in the same way."""
        numbers: dict[Node, int] = {}

        def of(nodes: Sequence[Node]) -> tuple[int, ...]:
            return tuple(numbers.setdefault(node, len(numbers)) for node in nodes)

        inside = tuple((x.template.name, of(x.operands), of(x.results)) for x in self.wires)
        outside = (self.operands, self.results, self.arriving, self.threaded)
        return inside, tuple(map(of, outside))

    def template(self, name: str) -> Template:
        """Make the template of all calls."""
        return _Joiner(self).template(name)


def joined(wires: Sequence[Wire], wanted: Collection[Node], gradients: Collection[Node]) -> Joined:
    """See calls as one.

    wanted: values that are used outside. gradients: values whose gradient is known from there.
    """
    made = {x for wire in wires for x in wire.results}
    operands = list(dict.fromkeys(x for wire in wires for x in wire.operands if x not in made))
    results = [x for wire in wires for x in wire.results if x in wanted]
    differentiable = {wire.results[i] for wire in wires for i in wire.template.differentiable}
    threaded = {wire.operands[i] for wire in wires for i in wire.template.threaded}
    return Joined(
        wires,
        operands,
        results,
        arriving=[x for x in results if x in gradients and x in differentiable],
        threaded=[x for x in operands if x in gradients and x in threaded],
    )


@dataclass
class _Copied:
    """A call whose forward is written, and what is left of it to write."""

    wire: Wire
    tangents: list[Node]
    backward: list[Node]
    gradients: Sequence[Node | None]
    copies: dict[Node, Node] = field(default_factory=dict)


class _Joiner:
    def __init__(self, whole: Joined) -> None:
        self.whole = whole
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.values: dict[Node, Node] = {}  # of the program -> of this graph
        self.gradients: dict[Node, Node] = {}  # of a value of the program

    def template(self, name: str) -> Template:
        whole = self.whole
        arguments: dict[Node, tuple[Value, Wire]] = {}
        for wire in whole.wires:
            for node, value in zip(wire.operands, wire.template.arguments, strict=True):
                arguments.setdefault(node, (value, wire))
        for node in whole.operands:
            self.values[node] = self.placeholder(node, arguments[node][1])
        for node in (*whole.arriving, *whole.threaded):
            self.gradients[node] = self.graph.placeholder("tangent")
        copied = [self.forward(wire) for wire in whole.wires]
        given = dict(self.gradients)
        for each in reversed(copied):
            self.backward(each)
        found = [
            None if self.gradients.get(x) is given.get(x) else self.gradients[x]
            for x in whole.operands
        ]
        results = [self.values[x] for x in whole.results]
        has_backward = any(wire.template.joint is not None for wire in whole.wires)
        self.graph.output((*results, *found) if has_backward else tuple(results))
        module = module_of(self.attributes, self.graph)
        template = Template(
            name=name,
            block=whole.wires[-1].template.block,
            arguments=tuple(arguments[node][0] for node in whole.operands),
            results=tuple(
                describe(Role.OUTPUT, str(i), x.meta["val"]) for i, x in enumerate(results)
            ),
            forward=module,
        )
        if not has_backward:
            return template
        parts = part_joint(
            module, num_arguments=len(whole.operands), num_results=len(whole.results)
        )
        template.joint, template.forward, template.backward = module, parts.forward, parts.backward
        template.saved = parts.saved
        template.gradients = tuple(
            None if x is None else describe(Role.GRADIENT, str(i), x.meta["val"])
            for i, x in enumerate(found)
        )
        template.differentiable = tuple(whole.results.index(x) for x in whole.arriving)
        template.threaded = tuple(whole.operands.index(x) for x in whole.threaded)
        return template

    def placeholder(self, node: Node, wire: Wire) -> Node:
        known = _joint(wire.template).graph.find_nodes(op="placeholder")
        new = self.graph.placeholder(f"operand_{len(self.values)}")
        new.meta = dict(known[wire.operands.index(node)].meta)
        return new

    def forward(self, wire: Wire) -> _Copied:
        joint = _joint(wire.template)
        placeholders = joint.graph.find_nodes(op="placeholder")
        tangents = placeholders[len(wire.operands) :]
        nodes = list(joint.graph.nodes)
        later = backward_nodes(nodes, tangents) if tangents else set()
        outputs = joint.graph.output_node().args[0]
        copied = _Copied(
            wire,
            tangents,
            [x for x in nodes if x in later and x.op in _WRITTEN],
            outputs[len(wire.results) :],
            dict(zip(placeholders, (self.values[x] for x in wire.operands), strict=False)),
        )
        for node in nodes:
            if node.op in _WRITTEN and node not in later:
                self.copy(node, copied)
        for node, result in zip(outputs, wire.results, strict=False):
            self.values[result] = copied.copies[node]
        return copied

    def backward(self, each: _Copied) -> None:
        template, wire = each.wire.template, each.wire
        arriving = [wire.results[i] for i in template.differentiable]
        arriving += [wire.operands[i] for i in template.threaded]
        for tangent, node in zip(each.tangents, arriving, strict=True):
            each.copies[tangent] = self.gradients[node]
            self.gradients[node].meta.setdefault("val", tangent.meta["val"])
        for node in each.backward:
            self.copy(node, each)
        for operand, gradient in zip(wire.operands, each.gradients, strict=False):
            if gradient is not None:
                self.gradients[operand] = each.copies[gradient]

    def copy(self, node: Node, into: _Copied) -> None:
        new = into.copies[node] = self.graph.node_copy(node, lambda x: into.copies[x])
        if node.op == "get_attr":
            new.target = f"{into.wire.template.name}_{node.target}".replace(".", "_")
            value = attrgetter(str(node.target))(_joint(into.wire.template))
            self.attributes[new.target] = value


def _joint(template: Template) -> Module:
    return template.joint or template.forward
