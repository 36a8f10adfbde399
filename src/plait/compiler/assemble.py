"""Parts of a value written where the whole will be, so that putting them together copies nothing.

A `cat` of parts that were just made becomes a buffer; the operators that make the parts write into
it (their `out=` forms run the same kernels). The last change before lowering: from here on nodes
write into memory that others see, and only their order says when it is complete.
"""

# pyright: basic
# (fx nodes are not typed.)

import math
from typing import Any

import torch
from torch import Tensor, fx

from plait.graph.graph import Module, Node, module_of
from plait.graph.partition import is_view

ASSEMBLED = "assembled"
"""Metadata of a `cat` of the parts of one value, which nobody else made."""
_aten = torch.ops.aten
_OUT = {
    _aten.mm.default: _aten.mm.out,
    _aten.addmm.default: _aten.addmm.out,
    _aten.bmm.default: _aten.bmm.out,
    _aten.add.Tensor: _aten.add.out,
    _aten.sub.Tensor: _aten.sub.out,
    _aten.mul.Tensor: _aten.mul.out,
    _aten.div.Tensor: _aten.div.out,
    _aten.silu.default: _aten.silu.out,
    _aten.gelu.default: _aten.gelu.out,
    _aten.tanh.default: _aten.tanh.out,
    _aten.silu_backward.default: _aten.silu_backward.grad_input,
    _aten.gelu_backward.default: _aten.gelu_backward.grad_input,
    _aten.tanh_backward.default: _aten.tanh_backward.grad_input,
}


def assemble(module: Module) -> Module:
    """Let parts be written into the whole, wherever all parts of a `cat` allow it."""
    if not any(_is_assembled(node) for node in module.graph.nodes):
        return module
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for cat, makers in wholes_of(graph).items():
        _assemble(cat, makers)
    return module_of(module, graph)


def wholes_of(graph: fx.Graph) -> dict[Node, list[Node]]:
    """Each `cat` that need not copy, and what makes its parts."""
    found: dict[Node, list[Node]] = {}
    taken: set[Node] = set()
    for node in graph.nodes:
        makers = _makers_of(node) if _is_assembled(node) else []
        if makers and not taken & set(makers):
            found[node] = makers
            taken |= set(makers)
    return found


def _is_assembled(node: Node) -> bool:
    return node.target is _aten.cat.default and bool(node.meta.get(ASSEMBLED))


def _makers_of(cat: Any) -> list[Node]:
    """What makes the parts, if all of it can write them where the whole will be; else nothing."""
    value, dim = cat.meta["val"], cat.args[1] if len(cat.args) > 1 else 0
    if not value.is_contiguous() or math.prod(value.shape[:dim]) != 1:
        return []
    makers = [_maker(part) for part in cat.args[0]]
    return [] if None in makers or len(set(makers)) < len(makers) else makers


def _assemble(cat: Any, makers: list[Any]) -> None:
    value, graph = cat.meta["val"], cat.graph
    first = min(makers, key=list(graph.nodes).index)
    with graph.inserting_before(first):
        kwargs = {"dtype": value.dtype, "device": value.device}
        buffer = graph.call_function(_aten.empty.memory_format, (list(value.shape),), kwargs)
        buffer.meta = dict(cat.meta)
    offset = 0
    for maker in makers:
        made = maker.meta["val"]
        with graph.inserting_before(maker):
            args = (buffer, list(made.shape), list(made.stride()), offset)
            place = graph.call_function(_aten.as_strided.default, args)
            place.meta = dict(maker.meta)
        maker.target = _OUT[maker.target]
        name = next(x.name for x in maker.target._schema.arguments if x.is_out)
        maker.kwargs = {**maker.kwargs, name: place}
        offset += made.numel()
    cat.replace_all_uses_with(buffer)
    graph.erase_node(cat)


def _maker(part: Any) -> Any:
    """The operator that makes the memory of a part, if it can write it elsewhere."""
    value = part.meta["val"]
    if not value.is_contiguous():
        return None
    node = part
    while is_view(node):
        node = node.args[0]
    if node.op != "call_function" or _OUT.get(node.target) is None:
        return None
    made = node.meta["val"]
    fills = isinstance(made, Tensor) and made.numel() == value.numel() == _extent(made)
    return node if fills and made.dtype == value.dtype else None


def _extent(x: Tensor) -> int:
    """Elements of memory from its first to its last."""
    return 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
