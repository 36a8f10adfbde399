"""Strict numerics for a captured graph: a row's result does not depend on the other rows.

A product of rows and a weight becomes one whose rows are summed alike however many there are
(`ops/row_exact.py`); a pointwise kernel that treats its last elements apart is run in whole vectors
(`ops/strict_pointwise.py`). What is contracted over the rows themselves, a weight gradient, stays
one product. What is left as it is, and why, is noted.

How rows are told from weights: a weight is what is made of parameters and buffers alone. Where this
errs, a product is strict that need not be, or one is left and noted: numbers are never wrong.
"""

# pyright: basic
# (fx nodes are not typed.)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg as _map_arg

import plait.ops.linear_cross_entropy as _registers_loss  # noqa: F401
import plait.ops.strict_linear as _registers_linear  # noqa: F401
import plait.ops.strict_pointwise as _registers_pointwise  # noqa: F401
from plait.compiler import strict_operators as known
from plait.compiler.rewrite import part_again, pass_saved
from plait.graph.graph import FORWARD, Graph, Module, Node, Role, Template, call_of
from plait.graph.note import Note, gathered
from plait.graph.partition import is_view
from plait.graph.random_nodes import is_random

# fx types it for what an argument may be, not for what is mapped here.
map_arg: Any = _map_arg
NAME = "strict numerics"
_aten, _plait = torch.ops.aten, torch.ops.plait
_WEIGHTS = (Role.PARAMETER, Role.BUFFER)
_IS_STRICT = 7  # of the arguments of a loss by rows
_CONTIGUOUS = torch.contiguous_format
_MEASURED = known.POINTWISE | known.ROWS | known.MOVES | known.OVER_TOKENS
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default)
_TWO_TOKENS = "rows on both sides: a weight gradient or attention, which stays one product"
_ATTENTION = "whole on the token dim; each element of the batch has its own sums"
_COLLECTIVE = "the order in which ranks are summed is the backend's"
_DRAWS = "random numbers are drawn for the whole tensor"
_WHOLE_LOSS = "one sum over all tokens, of more logits than are held at a time"
_UNKNOWN = "nobody measured whether a row's result depends on the others"


def is_strict(graph: Graph) -> bool:
    """Whether the pass below ran, or the model is strict itself: it has row-exact operators."""
    if graph.is_strict:
        return True
    modules = [graph.root, *(each.joint or each.forward for each in graph.templates.values())]
    return any(has_strict_operators(module) for module in modules)


def has_strict_operators(module: Module) -> bool:
    """Whether a module has row-exact operators."""
    return any(str(node.target).startswith("plait.strict_") for node in module.graph.nodes)


def strict_numerics(graph: Graph) -> Graph:
    """Rewrite the operators whose result for a row depends on how many rows there are.

    The graph's `notes` say what was rewritten and what was left.
    """
    graph = graph.copy()
    are_weights = _weights_among_arguments(graph)
    notes: list[Note] = []
    for name, template in graph.templates.items():
        notes += _rewrite_template(template, are_weights.get(name, []))
    pass_saved(graph)
    roles = [value.role in _WEIGHTS for value in graph.inputs]
    notes += _Rewriter(graph.root, roles, "root").run()
    graph.notes += gathered(notes)
    graph.is_strict = True
    return graph


def _rewrite_template(template: Template, are_weights: list[bool]) -> list[Note]:
    module = template.joint or template.forward
    notes = _Rewriter(module, are_weights, template.name).run()
    part_again(template)
    return notes


def _weights_among_arguments(graph: Graph) -> dict[str, list[bool]]:
    """Say of each template's arguments whether every call gives a weight there."""
    found = {name: [True] * len(each.arguments) for name, each in graph.templates.items()}
    roles = [value.role in _WEIGHTS for value in graph.inputs]
    before = None
    while before != found:
        before = {name: list(flags) for name, flags in found.items()}
        weights = _weights_in(graph.root, roles)
        for node in graph.root.graph.nodes:
            called = call_of(node)
            if called is None or called[1] != FORWARD:
                continue
            template, flags = graph.templates[called[0]], found[called[0]]
            for i, operand in enumerate(node.args[2:]):
                flags[i] = flags[i] and (operand in weights or not isinstance(operand, fx.Node))
            results = _weights_among_results(template, flags)
            weights.update(user for user in node.users if user.args[1] in results)
    return found


def _weights_among_results(template: Template, flags: list[bool]) -> set[int]:
    module = template.joint or template.forward
    weights = _weights_in(module, flags)
    outputs: Any = module.graph.output_node().args[0]
    return {i for i, x in enumerate(outputs[: len(template.results)]) if x in weights}


def _weights_in(module: Module, are_weights: Sequence[bool]) -> set[Node]:
    """The nodes made of weights alone. Tangents come after the inputs, and are none."""
    flags = iter(are_weights)
    weights: set[Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            is_weight = next(flags, False)
        elif node.all_input_nodes:
            is_weight = call_of(node) is None and all(x in weights for x in node.all_input_nodes)
        else:  # a constant of the code; of what is made from nothing, positions depend on the rows
            value = node.meta.get("val")
            is_weight = node.op == "get_attr" or not isinstance(value, Tensor) or value.numel() == 1
        if is_weight:
            weights.add(node)
    return weights


class _Rewriter:
    """Rewrites one fx graph in place."""

    def __init__(self, module: Module, are_weights: Sequence[bool], where: str) -> None:
        self.module, self.graph, self.where = module, module.graph, where
        self.weights = _weights_in(module, are_weights)
        self.notes: list[Note] = []

    def run(self) -> list[Note]:
        for node in list(self.graph.nodes):
            if isinstance(node.target, torch._ops.OpOverload) and not is_view(node):
                self.visit(node)
        self.module.recompile()
        return self.notes

    def visit(self, node: Node) -> None:
        name, space = node.target.overloadpacket.__name__, node.target.namespace
        if not _is_floating(node):
            return
        if node.target in _PRODUCTS:
            self.product(node)
        elif node.target is _plait.linear_cross_entropy_rows.default:
            node.args = (*node.args[:_IS_STRICT], True)
            self.note(node, "now with row-exact products", is_refusal=False)
        elif _needs_vectors(node, name):
            self.in_whole_vectors(node)
        elif reason := _reason_to_leave(node, name, space):
            self.leave(node, reason)

    def product(self, node: Node) -> None:
        *bias, a, b = node.args
        if a.meta["val"].shape[-1] == 1:
            return  # nothing is summed
        if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
            self.leave(node, "a scaled sum of products, which has no strict form yet")
            return
        is_batched = node.target is _aten.bmm.default
        linear = _plait.strict_batched_linear if is_batched else _plait.strict_linear
        with self.graph.inserting_before(node):
            if b in self.weights:
                new = self.emit(linear.default, (a, self.turned(b, node)), node)
            elif a in self.weights:
                rows = self.emit(linear.default, (self.turned(b, node), a), node)
                new = self.turned(rows, node)
                new = self.emit(_aten.clone.default, (new,), node, memory_format=_CONTIGUOUS)
            else:
                self.leave(node, _TWO_TOKENS)
                return
            for added in bias:
                new = self.emit(_aten.add.Tensor, (new, added), node)
        self.replace(node, new, str(linear.default))
        for operand in (a, b):
            if not operand.users and operand.op == "call_function":
                self.graph.erase_node(operand)

    def in_whole_vectors(self, node: Node) -> None:
        tensors, numbers, mode = [], [], ""
        for i, argument in enumerate(node.target._schema.arguments):
            given = node.kwargs.get(argument.name, argument.default_value)
            value = node.args[i] if i < len(node.args) else given
            kind = str(argument.type)
            if kind == "Tensor" and not isinstance(value, fx.Node):
                self.leave(node, "one of its operands is a number")
                return
            if kind == "Tensor":
                tensors.append(value)
            elif kind == "str":
                mode = value
            else:
                numbers.append(float(value))  # type: ignore[arg-type]
        operator_name = str(node.target).removeprefix("aten.")
        arguments = (operator_name, tensors, numbers, mode)
        with self.graph.inserting_before(node):
            new = self.emit(_plait.strict_pointwise.default, arguments, node)
        self.replace(node, new, "plait.strict_pointwise")

    def turned(self, x: Node, like: Node) -> Node:
        """The matrix transposed: what it was transposed from, where it was."""
        if x.op == "call_function" and x.target is _aten.t.default:
            return x.args[0]
        if x.meta["val"].dim() == 2:
            return self.emit(_aten.t.default, (x,), like)
        return self.emit(_aten.transpose.int, (x, 1, 2), like)

    def emit(self, target: Any, args: tuple, like: Node, **kwargs: object) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta = dict(like.meta)
        node.meta["val"] = target(*map_arg(args, lambda x: x.meta["val"]), **kwargs)
        return node

    def replace(self, node: Node, new: Node, by: str) -> None:
        before, after = node.meta["val"], new.meta["val"]
        assert (before.shape, before.stride()) == (after.shape, after.stride()), node.format_node()
        self.note(node, f"now {by}", is_refusal=False)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def leave(self, node: Node, reason: str) -> None:
        if node not in self.weights:
            self.note(node, reason, is_refusal=True)

    def note(self, node: Node, text: str, *, is_refusal: bool) -> None:
        self.notes.append(
            Note(
                by=NAME,
                operator=str(node.target),
                node=f"{self.where}/{node.name}",
                text=text,
                is_refusal=is_refusal,
            )
        )


def _is_floating(node: Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(x, Tensor) and x.dtype.is_floating_point for x in values)


def _needs_vectors(node: Node, name: str) -> bool:
    if node.target.namespace != "aten":
        return False
    if name in known.SCALED_SUMS:
        position = [argument.name for argument in node.target._schema.arguments].index("alpha")
        in_place = node.args[position] if position < len(node.args) else 1
        return node.kwargs.get("alpha", in_place) != 1
    if node.target is _aten.pow.Tensor_Scalar and node.args[1] in known.EXACT_POWERS:
        return False
    return name in known.VECTORS


def _reason_to_leave(node: Node, name: str, space: str) -> str:
    """Why the operator is left as it is; "" where that needs no reason."""
    if "scaled_dot_product" in name or name.startswith("blocked_causal_attention"):
        return _ATTENTION
    if is_random(node):
        return _DRAWS
    if node.target is _plait.linear_cross_entropy.default:
        return _WHOLE_LOSS
    if "c10d" in space:
        return _COLLECTIVE if "reduce" in name else ""
    if space == "plait" and name.startswith("strict_"):
        return ""
    is_known = space == "aten" and (name in _MEASURED or name == "pow")
    return "" if is_known else _UNKNOWN
