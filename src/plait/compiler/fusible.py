"""Which operators may stand in an island: those that read and write element by element, and sums.

Never a collective or a wait, a product of matrices, attention, what draws random numbers, what
writes into its operands, or what has a size that is not known.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator

import torch
from torch import Tensor

from plait.compiler.assemble import ASSEMBLED
from plait.graph.graph import Node
from plait.graph.island import looks_only
from plait.graph.random_nodes import is_random

_aten = torch.ops.aten
_BESIDES_POINTWISE = {
    _aten._to_copy.default,
    _aten.clone.default,
    _aten.cat.default,
    _aten.stack.default,
    _aten.where.self,
    _aten.fill.Scalar,
    _aten.full.default,
    _aten.full_like.default,
    _aten.zeros_like.default,
    _aten.ones_like.default,
    _aten.scalar_tensor.default,
    _aten.arange.default,
    _aten.arange.start,
    _aten.arange.start_step,
    _aten.sum.default,
    _aten.sum.dim_IntList,
    _aten.mean.default,
    _aten.mean.dim,
    _aten.amax.default,
    _aten.amin.default,
    _aten.var_mean.correction,
    _aten._softmax.default,
    _aten._softmax_backward_data.default,
    _aten._log_softmax.default,
    _aten._log_softmax_backward_data.default,
    _aten.native_layer_norm.default,
    _aten.native_layer_norm_backward.default,
    _aten.silu_backward.default,
    _aten.gelu_backward.default,
    _aten.tanh_backward.default,
    _aten.sigmoid_backward.default,
    _aten.threshold_backward.default,
    _aten.slice_backward.default,
    _aten.select_backward.default,
    _aten.constant_pad_nd.default,
}
_DTYPES = {
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
}


def is_fusible(node: Node) -> bool:
    """Whether an island may hold the operator, or the part of one that yields several values."""
    target = node.target
    if target is operator.getitem and not looks_only(node):
        return is_fusible(node.args[0])
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    if target not in _BESIDES_POINTWISE and torch.Tag.pointwise not in target.tags:
        return False
    if target.namespace != "aten" or target._schema.is_mutable or is_random(node):
        return False
    if node.meta.get(ASSEMBLED) or looks_only(node):
        return False
    return all(_is_plain(value) for value in (_value(node), *map(_value, node.all_input_nodes)))


def writes(node: Node) -> bool:
    """Whether the node changes what it is given."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _value(node: Node) -> object:
    return node.meta.get("val")


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(x is None or _is_plain(x) for x in value)
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.dtype in _DTYPES
        and all(type(n) is int for n in (*value.shape, *value.stride()))
    )
