"""Write a result over an operand that dies with it, as autograd does where it sums gradients.

The same kernel computes the same bits; a buffer less is allocated and touched. Only arithmetic and
sums over ranks qualify whose first operand was made by an operator of the same program and is seen
by nobody else.
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
    _c10d.all_reduce.default: _c10d.all_reduce_.default,
}
NOT_IN_PLACE = {str(written): str(made) for made, written in _IN_PLACE.items()}
"""The operator that makes a new value, by name, for one that was chosen here."""


def in_place_target(node: Node) -> object | None:
    """The in-place form of the node's operator, if nobody can tell the difference."""
    in_place = _IN_PLACE.get(node.target)
    return in_place if in_place is not None and _can_take_over(node, node.args[0]) else None


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


def _can_take_over(node: Node, operand: object) -> bool:
    if not isinstance(operand, fx.Node) or node.args[1] is operand:
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
