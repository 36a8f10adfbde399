"""Write a result over an operand that dies with it, as autograd does where it sums gradients.

The same kernel computes the same bits; a buffer less is allocated and touched. Only arithmetic and
sums over ranks qualify, and only an operand that was made by an operator of the same program and is
seen by nobody else.
"""

# pyright: basic
# (fx nodes are not typed.)

import torch
from torch import Tensor, fx

from plait.graph.graph import Node

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
_IN_PLACE = {
    _aten.add.Tensor: _aten.add_.Tensor,
    _aten.sub.Tensor: _aten.sub_.Tensor,
    _aten.mul.Tensor: _aten.mul_.Tensor,
    _aten.div.Tensor: _aten.div_.Tensor,
    _aten.add.Scalar: _aten.add_.Scalar,
    _aten.mul.Scalar: _aten.mul_.Scalar,
    _aten.div.Scalar: _aten.div_.Scalar,
    _c10d.all_reduce.default: _c10d.all_reduce_.default,
}
_COMMUTE = (_aten.add.Tensor, _aten.mul.Tensor)
NOT_IN_PLACE = {str(written): str(made) for made, written in _IN_PLACE.items()}
"""The operator that makes a new value, by name, for one that was chosen here."""


def in_place(node: Node) -> tuple[object, tuple]:
    """What to call, and with what: the in-place form, if nobody can tell the difference.

    Of a sum or product of two tensors either may be written over; the order of both is free.
    """
    written = _IN_PLACE.get(node.target)
    if written is not None:
        orders = [node.args]
        if node.target in _COMMUTE and len(node.args) == 2 and not node.kwargs:
            orders.append(node.args[::-1])
        for first, *others in orders:
            if _can_take_over(node, first, others):
                return written, (first, *others)
    return node.target, node.args


def is_sum(node: Node) -> bool:
    """Whether it adds two tensors of one form, as autograd does with gradients."""
    if node.target is not _aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    forms = [_form(x) for x in (*node.args, node)]
    return None not in forms and len(set(forms)) == 1


def _form(x: object) -> tuple | None:
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not isinstance(value, Tensor) or not all(isinstance(n, int) for n in value.shape):
        return None
    return (value.shape, value.dtype, value.device)


def _can_take_over(node: Node, operand: object, others: list) -> bool:
    if not isinstance(operand, fx.Node) or operand in others:
        return False
    before, after = operand.meta.get("val"), node.meta.get("val")
    return (
        isinstance(before, Tensor)
        and isinstance(after, Tensor)
        and before.dtype == after.dtype
        and before.device == after.device
        and before.shape == after.shape
        and before.stride() == after.stride()
        and _is_own(operand)
    )


def _is_own(operand: Node) -> bool:
    """Whether the operand's memory was made for it, and only the one user sees it."""
    if operand.op != "call_function" or len(operand.users) != 1:
        return False
    target = operand.target
    if target is _aten._unsafe_view.default:
        return _is_own(operand.args[0])
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace in ("aten", "plait")
        and not target.is_view
        and not target._schema.is_mutable
        and len(target._schema.returns) == 1
        and target not in _MAY_RETURN_OPERAND
    )


_MAY_RETURN_OPERAND = {
    _aten._reshape_alias.default,
    _aten.contiguous.default,
    _aten.lift_fresh.default,
    _aten.detach.default,
    _aten.alias.default,
    _aten.resolve_conj.default,
    _aten.resolve_neg.default,
    _aten.real.default,
    _aten.reshape.default,
    _aten.to.dtype,
}
