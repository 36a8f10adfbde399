"""A joint graph with its proven region split: each node of it stands there once for each replica.

What is not in the region keeps all tokens: it takes the parts of a value put together (`cat`),
and the region takes parts of what it makes (`slice`). So weight gradients stay one product. Where
something whole is needed of a forward value, the backward takes slices of that instead of the
parts: one of both is kept, not two.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from plait.compiler.assemble import ASSEMBLED
from plait.compiler.token_moves import Tokens
from plait.compiler.token_rules import part_dim, takes_whole
from plait.compiler.tokens import Certificate
from plait.graph.graph import Module, Node, module_of
from plait.graph.partition import backward_nodes, is_view

PLACE, REPLICA = "place", "replica"
"""What a node's metadata say: where its original stood, and for which replica it works."""

_aten = torch.ops.aten
_map_nodes: Any = map_arg
SIZED = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.expand.default,
}
"""Operators that are given the shape of their result."""
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}


Form = tuple[Any, ...]
"""What is known of an operator and its operands without running it, as a key."""


@dataclass(frozen=True)
class Parts:
    """How many of the tokens each replica has."""

    sizes: tuple[int, ...]

    def __str__(self) -> str:
        """As in 512 + 512."""
        return " + ".join(map(str, self.sizes))

    @property
    def total(self) -> int:
        """All tokens."""
        return sum(self.sizes)

    def bounds(self, length: int) -> list[tuple[int, int]]:
        """Where the parts of a dim of this size start and stop; it is a multiple or a share."""
        ends = [end * length // self.total for end in accumulate(self.sizes)]
        assert all(end * length % self.total == 0 for end in accumulate(self.sizes)), length
        return list(zip([0, *ends], ends, strict=False))


def replicate_joint(
    joint: Module,
    certificate: Certificate,
    parts: Parts,
    *,
    num_tangents: int,
    results_in_parts: Sequence[bool],
    known: dict[Form, Any] | None = None,
) -> Module:
    """Split the region of a joint graph.

    Inputs in the region become one input for each part; results_in_parts says for each output
    whether it becomes one for each part, too. known: what operators make of operands of a form, as
    found before; it grows.
    """
    writer = _Writer(joint, certificate, parts, num_tangents, {} if known is None else known)
    return writer.write(results_in_parts)


class _Writer:
    def __init__(
        self,
        joint: Module,
        certificate: Certificate,
        parts: Parts,
        num_tangents: int,
        known: dict[Form, Any],
    ) -> None:
        self.joint, self.certificate, self.parts, self.known = joint, certificate, parts, known
        self.nodes = list(joint.graph.nodes)
        placeholders = joint.graph.find_nodes(op="placeholder")
        first_tangent = len(placeholders) - num_tangents
        self.backward = backward_nodes(self.nodes, placeholders[first_tangent:])
        self.graph = fx.Graph()
        self.at = {node: i for i, node in enumerate(self.nodes)}
        self.whole: dict[Node, Node] = {}
        self.split: dict[Node, list[Node]] = {}
        self.slices: dict[tuple[Node, int, int], Node] = {}
        self.masks: dict[Node, Node] = {}
        self.mode = next(
            node.meta["val"].fake_mode
            for node in placeholders
            if isinstance(node.meta.get("val"), Tensor)
        )

    def write(self, results_in_parts: Sequence[bool]) -> Module:
        outputs = self.joint.graph.output_node().args[0]
        self.needed = self.needed_whole(outputs, results_in_parts)
        for node in self.nodes:
            if node.op == "placeholder":
                self.placeholder(node)
            elif node.op == "get_attr":
                self.whole[node] = self.graph.node_copy(node)
            elif node.op == "call_function":
                self.operator(node)
        results = []
        for node, in_parts in zip(outputs, results_in_parts, strict=True):
            if not isinstance(node, fx.Node):
                results += [node] * (len(self.parts.sizes) if in_parts else 1)
            elif in_parts:
                results += self.parts_of(node)
            else:
                results.append(self.whole_of(node))
        self.graph.output(tuple(results))
        return module_of(self.joint, self.graph)

    def needed_whole(self, outputs: Sequence, results_in_parts: Sequence[bool]) -> set[Node]:
        """Nodes of the region of which something outside needs all tokens."""
        region = self.certificate.region
        users = [
            source
            for node in self.nodes
            if node.op == "call_function"
            for source in node.all_input_nodes
            if node not in region or takes_whole(node, source, self.certificate.tokens)
        ]
        users += [
            node
            for node, in_parts in zip(outputs, results_in_parts, strict=True)
            if not in_parts and isinstance(node, fx.Node)
        ]
        return {self.seen_by(node) for node in users} & region

    def seen_by(self, node: Node) -> Node:
        """What a view of the region looks at in the end."""
        while node in self.certificate.region and self.is_seen_through(node):
            node = node.args[0]
        return node

    def is_seen_through(self, node: Node) -> bool:
        """Whether the whole of a node is a view of the whole of its operand."""
        if not is_view(node):
            return False
        tokens = self.certificate.tokens.get(node.args[0])
        each = tokens if isinstance(tokens, tuple) else (tokens,)
        return all(x.is_row for x in each if isinstance(x, Tokens))

    def placeholder(self, node: Node) -> None:
        if node not in self.certificate.region:
            self.whole[node] = self.graph.node_copy(node)
            return
        tokens = self.certificate.tokens[node]
        assert isinstance(tokens, Tokens)
        self.split[node] = []
        for i, (start, stop) in enumerate(self.parts.bounds(tokens.length)):
            copy = self.graph.placeholder(f"{node.name}_part{i}")
            copy.meta = dict(node.meta)
            with self.mode:
                value = node.meta["val"]
                shape = list(value.shape)
                shape[tokens.dim] = stop - start
                copy.meta["val"] = value.new_empty_strided(shape, _dense(shape, _order(value)))
            self.split[node].append(copy)

    def operator(self, node: Node) -> None:
        if node not in self.certificate.region:
            self.whole[node] = self.copy(node, self.whole_of)
            return
        count = range(len(self.parts.sizes))
        if node in self.certificate.causal:
            self.split[node] = [self.attention(node, i) for i in count]
        elif self.is_key_gradient(node):
            self.split[node] = self.key_gradients(node)
        else:
            self.split[node] = [
                self.copy(node, lambda x, i=i: self.operand(node, x, i), part=i) for i in count
            ]
        if node in self.needed and node not in self.backward:
            self.whole_of(node)

    def operand(self, node: Node, source: Node, i: int) -> Node:
        """What replica i of a node takes for an operand."""
        region, tokens = self.certificate.region, self.certificate.tokens
        if takes_whole(node, source, tokens):
            return self.whole_of(source)
        if source in self.certificate.drawn:
            return self.drawn_part(source, i)
        if source in region:
            late = node in self.backward and source not in self.backward
            if late and self.seen_by(source) in self.needed:
                return self.slice(source, tokens[source], i)
            return self.split[source][i]
        dim = part_dim(node, source, tokens)
        if dim is None:
            return self.whole_of(source)
        length = source.meta["val"].shape[dim]
        return self.slice(source, Tokens(dim, length, self.parts.total), i)

    def attention(self, node: Node, i: int) -> Node:
        """The attention of the queries of part i to the keys of the parts up to it."""
        parts = self.certificate.causal[node]
        args = list(parts.args)
        for at, x in enumerate(args):
            if isinstance(x, fx.Node):
                args[at] = self.up_to(node, x, i) if at in parts.keys else self.operand(node, x, i)
        return self.placed(self.call(parts.target, tuple(args), {}, node), node, i)

    def up_to(self, node: Node, source: Node, i: int) -> Node:
        """What an attention takes of keys or values: the parts up to the i-th, side by side."""
        tokens = self.certificate.tokens[source]
        assert isinstance(tokens, Tokens)
        late = node in self.backward and source not in self.backward
        if source not in self.certificate.region or (late and self.seen_by(source) in self.needed):
            stop = self.parts.bounds(tokens.length)[i][1]
            return self.call(
                _aten.slice.Tensor, (self.whole_of(source), tokens.dim, 0, stop), {}, node
            )
        before = self.split[source][: i + 1]
        if i == 0:
            return before[0]
        return self.placed(self.call(_aten.cat.default, (before, tokens.dim), {}, node), node, i)

    def is_key_gradient(self, node: Node) -> bool:
        if node.target is not operator.getitem:
            return False
        parts = self.certificate.causal.get(node.args[0])
        return parts is not None and node.args[1] in parts.key_results

    def key_gradients(self, node: Node) -> list[Node]:
        """The gradient of each part of the keys: of what the parts from it on add to it."""
        tokens = self.certificate.tokens[node]
        assert isinstance(tokens, Tokens)
        bounds = self.parts.bounds(tokens.length)
        made = [
            self.call(operator.getitem, (part, node.args[1]), {}, node)
            for part in self.split[node.args[0]]
        ]
        found = []
        for i, (start, stop) in enumerate(bounds):
            summands = [
                self.call(_aten.slice.Tensor, (x, tokens.dim, start, stop), {}, node)
                for x in reversed(made[i:])  # going back, the last part comes first
            ]
            total = summands[0]
            for each in summands[1:]:
                total = self.placed(self.call(_aten.add.Tensor, (total, each), {}, node), node, i)
            found.append(total)
        return found

    def drawn_part(self, source: Node, i: int) -> Node:
        """The mask of the tokens that the rank has of replica i: each keeps its mask."""
        drawn = self.certificate.drawn[source]
        tokens = drawn.tokens
        key = (source, tokens.dim, i)
        if key not in self.slices:
            size = tokens.total // tokens.length
            if source not in self.masks:  # of all tokens, in their order: every rank drew the same
                masks = [self.whole_of(source)] * size
                self.masks[source] = self.call(_aten.cat.default, (masks, tokens.dim), {}, source)
            start, stop = self.parts.bounds(tokens.total)[i]
            args = (self.masks[source], tokens.dim, start, stop)
            part = self.call(_aten.slice.Tensor, args, {}, source)
            args = (part, tokens.dim, size, 0, drawn.axis)
            self.slices[key] = self.call(torch.ops.plait.own_part.default, args, {}, source)
        return self.slices[key]

    def parts_of(self, node: Node) -> list[Node]:
        """Parts as they leave: laid out like the whole, without what lies between the parts."""
        tokens = self.certificate.tokens[node]
        count = len(self.parts.sizes)
        parts = self.split.get(node) or [self.slice(node, tokens, i) for i in range(count)]
        return [self.laid_out(part, node) for part in parts]

    def laid_out(self, part: Node, node: Node) -> Node:
        value, order = part.meta["val"], _order(node.meta["val"])
        wanted = _dense(value.shape, order)
        if all(n == 1 or wanted[d] == value.stride(d) for d, n in enumerate(value.shape)):
            return part
        part = self.call(_aten.permute.default, (part, order), {}, node)
        kwargs = {"memory_format": torch.contiguous_format}
        part = self.call(_aten.clone.default, (part,), kwargs, node)
        return self.call(_aten.permute.default, (part, _inverse(order)), {}, node)

    def slice(self, source: Node, tokens: object, i: int) -> Node:
        assert isinstance(tokens, Tokens), source.format_node()
        key = (source, tokens.dim, i)
        if key not in self.slices:
            start, stop = self.parts.bounds(tokens.length)[i]
            whole = self.whole_of(source)
            self.slices[key] = self.call(
                _aten.slice.Tensor, (whole, tokens.dim, start, stop), {}, source
            )
            if source not in self.backward:  # where its operand is made, not where it is used
                self.slices[key].meta.pop("partitioner_tag", None)
        return self.slices[key]

    def whole_of(self, node: Node) -> Node:
        if node not in self.whole:
            if self.is_seen_through(node):
                self.whole[node] = self.copy(node, self.whole_of)
            else:
                tokens = self.certificate.tokens[node]
                assert isinstance(tokens, Tokens)
                assert tokens.is_row, node.format_node()
                self.whole[node] = self.put_together(node, tokens.dim)
        return self.whole[node]

    def put_together(self, node: Node, dim: int) -> Node:
        """The parts of a value side by side, laid out in memory as the whole was."""
        parts, value = self.split[node], node.meta["val"]
        order = _order(value)
        if order == list(range(value.dim())):
            return self.assembled(parts, dim, node)
        parts = [self.call(_aten.permute.default, (part, order), {}, node) for part in parts]
        whole = self.assembled(parts, order.index(dim), node)
        return self.call(_aten.permute.default, (whole, _inverse(order)), {}, node)

    def assembled(self, parts: list[Node], dim: int, node: Node) -> Node:
        whole = self.call(_aten.cat.default, (parts, dim), {}, node)
        whole.meta[ASSEMBLED] = True
        return whole

    def copy(self, node: Node, operand: Callable[[Node], Node], part: int | None = None) -> Node:
        args, kwargs = _map_nodes((node.args, node.kwargs), operand)
        if part is not None:
            args = self.sized(node, args, part)
        return self.placed(self.call(node.target, args, kwargs, node), node, part)

    def placed(self, copy: Node, node: Node, part: int | None) -> Node:
        copy.meta[PLACE], copy.meta[REPLICA] = self.at[node], part
        return copy

    def sized(self, node: Node, args: tuple, part: int) -> tuple:
        """The arguments with the sizes of a part in place of those of the whole."""
        tokens = self.certificate.tokens[node]
        if node.target in SIZED:
            assert isinstance(tokens, Tokens)
            start, stop = self.parts.bounds(tokens.length)[part]
            shape = list(node.meta["val"].shape)
            shape[tokens.dim] = stop - start
            return (args[0], shape)
        if node.target is _aten.slice_backward.default:
            assert isinstance(tokens, Tokens)
            start, stop = self.parts.bounds(tokens.length)[part]
            shape = list(args[1])
            shape[tokens.dim] = stop - start
            return (args[0], shape, *args[2:])
        if node.target is _aten.split.Tensor and isinstance(tokens, tuple):
            first, source = tokens[0], self.certificate.tokens[node.args[0]]
            assert isinstance(first, Tokens)
            assert isinstance(source, Tokens)
            if first != source:  # it takes shards of the tokens
                start, stop = self.parts.bounds(first.length)[part]
                return (args[0], stop - start, *args[2:])
        return args

    def call(self, target: Any, args: tuple, kwargs: dict, like: Node) -> Node:
        """Write a node, and find out what it makes."""
        try:
            value = self.value_of(target, args, kwargs)
        except (RuntimeError, ValueError):  # the part of a value may lie otherwise than the whole
            if target not in _VIEWS:
                raise
            target = _aten.reshape.default
            value = self.value_of(target, args, kwargs)
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {key: x for key, x in like.meta.items() if key != "val"}
        node.meta["val"] = value
        return node

    def value_of(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is operator.getitem:
            return args[0].meta["val"][args[1]]
        form = (target, _form(args), _form(tuple(kwargs.items())))
        if form not in self.known:
            values = _map_nodes((args, kwargs), lambda node: node.meta["val"])
            with self.mode:
                self.known[form] = target(*values[0], **values[1])
        return self.known[form]


def _form(argument: Any) -> Form:
    """All that the form of a result rests on; numbers equal to others of another type differ."""
    if isinstance(argument, fx.Node):
        value = argument.meta["val"]
        return _form_of(value) if isinstance(value, Tensor) else tuple(map(_form_of, value))
    if isinstance(argument, tuple | list):
        return tuple(map(_form, argument))
    return type(argument), argument


def _form_of(x: Tensor) -> Form:
    return (x.dtype, x.device, tuple(x.shape), x.stride(), x.storage_offset(), x.requires_grad)


def _order(value: Tensor) -> list[int]:
    """Dims from the outermost in memory to the innermost."""
    return sorted(range(value.dim()), key=lambda dim: (-value.stride(dim), dim))


def _dense(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """Strides without gaps, of dims in this order from the outermost to the innermost."""
    strides, stride = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = stride
        stride *= shape[dim]
    return strides


def _inverse(order: Sequence[int]) -> list[int]:
    return [list(order).index(dim) for dim in range(len(order))]
