"""Compose the joint graph of a whole module from its pieces.

Backwards first: walking the pieces from the last to the first, one knows at each exactly which
gradients arrive and which operands have later users, and traces the piece for just that. A piece
that is used again in the same way is not traced again. Then the root graph is written down.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from plait.graph.cut import Piece, cut
from plait.graph.graph import (
    BACKWARD,
    FORWARD,
    Graph,
    Role,
    Template,
    Value,
    call,
    describe,
    module_of,
)
from plait.graph.join import Wire, joined
from plait.graph.trace import NotATemplate, Use, trace


@dataclass(frozen=True)
class _Call:
    piece: Piece
    template: Template


Names = dict[fx.Node, tuple[Role, str]]
"""What the module's inputs are, where that is known."""


def compose(
    module: fx.GraphModule,
    fake_mode: FakeTensorMode,
    names: Names | None = None,
    *,
    num_attentions: int = 0,
) -> Graph:
    """Make the joint graph of a module from TorchDynamo; its results are those of the module.

    num_attentions: see `cut`.

    Raises NotATemplate where the module must be captured as a whole: dynamic shapes, changes in
    place of what comes from outside, results that share memory with inputs.
    """
    pieces = cut(module, num_attentions=num_attentions)
    outputs: Any = module.graph.output_node().args[0]
    inputs = module.graph.find_nodes(op="placeholder")
    composer = _Composer(pieces, inputs, outputs, module, fake_mode, names or {})
    return composer.run()


class _Composer:
    def __init__(
        self,
        pieces: list[Piece],
        inputs: Sequence[fx.Node],
        outputs: Sequence[fx.Node],
        module: fx.GraphModule,
        fake_mode: FakeTensorMode,
        names: Names,
    ) -> None:
        self.names = names
        self.pieces, self.inputs, self.outputs = pieces, inputs, outputs
        self.module, self.fake_mode = module, fake_mode
        self.templates: dict[tuple, Template] = {}
        self.joined: dict[tuple, Template] = {}
        if not all(isinstance(node, fx.Node) for node in outputs):
            raise NotATemplate("it returns something that is not a tensor")
        self.values = {
            node: self.describe(node)
            for node in [
                *inputs,
                *(x for piece in pieces for x in (*piece.operands, *piece.results)),
            ]
            if node is not None
        }
        self.check_outputs()

    def describe(self, node: fx.Node) -> Value:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.module)
        else:
            value = node.meta["example_value"]
        role, name = self.names.get(node, (Role.INPUT, node.name))
        return describe(role, name, value)

    def check_outputs(self) -> None:
        produced = {x for piece in self.pieces for x in piece.results}
        if len(set(self.outputs)) < len(self.outputs):
            raise NotATemplate("it returns the same tensor twice")
        storages = [
            storage_of(node.meta["example_value"])
            for node in (*self.outputs, *self.inputs)
            if isinstance(node, fx.Node) and isinstance(node.meta.get("example_value"), Tensor)
        ]
        for node in self.outputs:
            if node not in produced or not isinstance(node.meta["example_value"], Tensor):
                raise NotATemplate("it returns something that no operator of its own makes")
            if storages.count(storage_of(node.meta["example_value"])) > 1:
                raise NotATemplate("a result shares memory with an input or another result")

    def run(self) -> Graph:
        needing = {node for node in self.values if _needs_gradient(node)}
        tangents = [node for node in self.outputs if node in needing and torch.is_grad_enabled()]
        gradients: dict[fx.Node, Value] = {
            node: describe(Role.TANGENT, str(self.outputs.index(node)), node.meta["example_value"])
            for node in tangents
        }
        calls: list[_Call] = []
        wanted = set(self.outputs)
        for group in reversed(_groups(self.pieces)):
            known = set(gradients)
            together: list[_Call] = []
            for piece in reversed(group):
                template = self.template(piece, gradients, needing)
                for operand, gradient in zip(piece.operands, template.gradients, strict=False):
                    if gradient is not None:
                        gradients[operand] = gradient
                together.insert(0, _Call(piece, template))
            calls.insert(0, self.join(together, wanted, known) if len(group) > 1 else together[0])
            wanted |= {x for piece in group for x in piece.operands}
        return _Writer(self, calls, tangents, gradients).write()

    def join(self, calls: list[_Call], wanted: set[fx.Node], known: set[fx.Node]) -> _Call:
        """Make one call of several. known: values for which gradients arrive from behind them."""
        wires = [
            Wire(x.template, tuple(x.piece.operands), tuple(filter(None, x.piece.results)))
            for x in calls
        ]
        whole = joined(wires, wanted, known)
        if whole.key not in self.joined:
            name = f"{calls[-1].piece.block}_{len(self.templates) + len(self.joined)}"
            self.joined[whole.key] = whole.template(name)
        last = calls[-1].piece
        piece = replace(last, operands=whole.operands, results=list(whole.results), goes_on=False)
        return _Call(piece, self.joined[whole.key])

    def template(
        self, piece: Piece, gradients: dict[fx.Node, Value], needing: set[fx.Node]
    ) -> Template:
        arriving = tuple(
            _plain(gradients.get(x)) if piece.modes.grad else None
            for x in piece.results
            if x is not None
        )
        needs = tuple(x in needing and piece.modes.grad for x in piece.operands)
        threaded = tuple(i for i, x in enumerate(piece.operands) if needs[i] and x in gradients)
        if all(x is None for x in arriving):
            threaded = ()  # nothing to add to what the later users send
        use = Use(
            operands=tuple(describe(Role.INPUT, "", self.values[x]) for x in piece.operands),
            needs_gradient=needs,
            tangents=arriving,
            threaded=threaded,
            modes=piece.modes,
        )
        key = (piece.key, tuple(x is None for x in piece.results), use)
        if key not in self.templates:
            self.templates[key] = trace(
                _dropping_unused(piece),
                use,
                name=f"{piece.block}_{len(self.templates) + len(self.joined)}",
                block=piece.block,
                fake_mode=self.fake_mode,
            )
        return self.templates[key]


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that are to be one template."""
    groups: list[list[Piece]] = [[]]
    for piece in pieces:
        groups[-1].append(piece)
        if not piece.goes_on:
            groups.append([])
    return [group for group in groups if group]


class _Writer:
    """Writes the root: placeholders, forward calls, backward calls in reverse order."""

    def __init__(
        self,
        composer: _Composer,
        calls: list[_Call],
        tangents: list[fx.Node],
        gradients: dict[fx.Node, Value],
    ) -> None:
        self.composer, self.calls, self.tangents, self.gradients = (
            composer,
            calls,
            tangents,
            gradients,
        )
        self.graph = fx.Graph()
        self.at: dict[fx.Node, fx.Node] = {}  # node of the module -> its value in the root
        self.gradient_at: dict[fx.Node, fx.Node] = {}
        self.forward_at: dict[int, fx.Node] = {}  # by id of the call

    def write(self) -> Graph:
        composer, graph = self.composer, self.graph
        inputs = [composer.values[node] for node in composer.inputs]
        for node in composer.inputs:
            self.at[node] = graph.placeholder(_placeholder_name(composer.values[node]))
            self.at[node].meta["val"] = composer.values[node]
        for node in self.tangents:
            tangent = self.gradient_of_output(node)
            self.gradient_at[node] = graph.placeholder(f"tangent_{node.name}")
            self.gradient_at[node].meta["val"] = tangent
            inputs.append(tangent)
        saved = [self.forward(each) for each in self.calls]
        for each, values in zip(reversed(self.calls), reversed(saved), strict=True):
            self.backward(each, values)
        outputs = [
            describe(Role.OUTPUT, str(i), node.meta["example_value"])
            for i, node in enumerate(composer.outputs)
        ]
        wanted = [node for node in composer.inputs if node in self.gradient_at]
        results = [self.at[node] for node in composer.outputs]
        graph.output(tuple(results + [self.gradient_at[node] for node in wanted]))
        outputs += [
            describe(Role.GRADIENT, composer.values[node].name, self.gradients[node])
            for node in wanted
        ]
        return Graph(
            root=module_of(composer.module, graph),
            templates={each.template.name: each.template for each in reversed(self.calls)},
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            num_forward_outputs=len(composer.outputs),
        )

    def gradient_of_output(self, node: fx.Node) -> Value:
        return describe(
            Role.TANGENT, str(self.composer.outputs.index(node)), node.meta["example_value"]
        )

    def forward(self, each: _Call) -> list[fx.Node]:
        """Write the call, and return what its backward takes."""
        piece, template = each.piece, each.template
        operands = [self.value(x) for x in piece.operands]
        node = self.call(template, FORWARD, operands)
        self.forward_at[id(each)] = node
        yielded = template.yields(FORWARD)
        used = [x for x in piece.results if x is not None]
        for i, result in enumerate(used):
            self.at[result] = self.part(node, i, yielded[i])
        computed = iter(range(len(used), len(yielded)))
        return [
            operands[int(value.name)]
            if value.role is Role.INPUT
            else self.part(node, next(computed), value)
            for value in template.saved
        ]

    def backward(self, each: _Call, saved: list[fx.Node]) -> None:
        piece, template = each.piece, each.template
        if template.backward is None:
            return
        used = [x for x in piece.results if x is not None]
        arriving = [self.gradient_at[used[i]] for i in template.differentiable]
        arriving += [self.gradient_at[piece.operands[i]] for i in template.threaded]
        node = self.call(template, BACKWARD, [*saved, *arriving])
        node.meta["forward"] = self.forward_at[id(each)]
        present = [x for x, g in zip(piece.operands, template.gradients, strict=True) if g]
        for i, operand in enumerate(present):
            self.gradient_at[operand] = self.part(node, i, self.gradients[operand])

    def value(self, node: fx.Node) -> fx.Node:
        if node not in self.at:
            self.at[node] = self.graph.get_attr(str(node.target))
            self.at[node].meta["val"] = self.composer.values[node]
        return self.at[node]

    def call(self, template: Template, part: str, operands: list[fx.Node]) -> fx.Node:
        name = f"{template.name}_{part}".lower()
        return self.graph.create_node(
            "call_function", call, (template.name, part, *operands), name=name
        )

    def part(self, node: fx.Node, i: int, value: Value) -> fx.Node:
        part = self.graph.call_function(operator.getitem, (node, i))
        part.meta["val"] = value
        return part


def _placeholder_name(value: Value) -> str:
    name = "".join(c if c.isalnum() else "_" for c in value.name)
    return f"{value.role.value}_{name}" if name[:1].isdigit() else name.strip("_")


def _needs_gradient(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.requires_grad


def _plain(value: Value | None) -> Value | None:
    """The value without its name, so that uses of different layers compare equal."""
    if value is None:
        return None
    return describe(Role.INPUT, "", value)


def _dropping_unused(piece: Piece) -> fx.GraphModule:
    if all(x is not None for x in piece.results):
        return piece.module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    outputs: Any = graph.graph_copy(piece.module.graph, copies)
    kept = [x for x, used in zip(outputs, piece.results, strict=True) if used is not None]
    graph.output(tuple(kept))
    return module_of(piece.module, graph)


def storage_of(x: Tensor) -> int:
    """What tells one memory from another."""
    return x.untyped_storage()._cdata
