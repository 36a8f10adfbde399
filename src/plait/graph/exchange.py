"""What the ranks of the axis `tp` exchange around a layer: functions with their gradients.

Each is a pair of collectives, one for the forward and one for the backward. They take and return
plain local tensors, so nothing but the collectives themselves appears in a graph.

"Summed" gradients: each rank knows only what its own features make of a value, and the whole
gradient is the sum. "Equal": each rank computes the whole gradient.
"""

# pyright: reportIncompatibleMethodOverride=false
# (Function.backward is typed for any number of gradients; ours have one.)

# Shapes: B batch, T tokens, t a rank's own tokens (T / size), D features.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import Function

from plait.errors import PlanError

TOKENS = 1
"""The dim of a model's hidden states that counts tokens."""


@dataclass(frozen=True)
class RankOfAxis:
    """The name of the process group, its size, and the rank in it."""

    group: str
    size: int
    rank: int


Exchange = Callable[[Tensor, RankOfAxis], Tensor]


def spread(x: Tensor, axis: RankOfAxis) -> Tensor:
    """Give an equal value to layers that use own features: forward nothing, backward a sum."""
    return _apply(_Spread, x, axis)


def sum_up(x: Tensor, axis: RankOfAxis) -> Tensor:
    """Sum partial values: forward an all-reduce, backward nothing, as gradients are equal."""
    return _apply(_SumUp, x, axis)


def gather_tokens(x_BtD: Tensor, axis: RankOfAxis) -> Tensor:
    """Forward all ranks' tokens; backward the sum of gradients, of own tokens (reduce-scatter)."""
    return _apply(_GatherTokens, x_BtD, axis)


def sum_own_tokens(x_BTD: Tensor, axis: RankOfAxis) -> Tensor:
    """Forward the sum of partial values, of own tokens (reduce-scatter); backward an all-gather."""
    check_tokens(x_BTD, axis)
    return _apply(_SumOwnTokens, x_BTD, axis)


def own_tokens(x_BTD: Tensor, axis: RankOfAxis) -> Tensor:
    """Take own tokens of an equal value; backward an all-gather."""
    check_tokens(x_BTD, axis)
    return _apply(_OwnTokens, x_BTD, axis)


def whole_tokens(x_BtD: Tensor, axis: RankOfAxis) -> Tensor:
    """Forward all ranks' tokens; backward own tokens, as gradients are equal."""
    return _apply(_WholeTokens, x_BtD, axis)


def whole_features(x: Tensor, axis: RankOfAxis) -> Tensor:
    """Forward all ranks' features (last dim); backward own features, as gradients are equal."""
    return _apply(_WholeFeatures, x, axis)


def own_number(axis: RankOfAxis, device: torch.device) -> Tensor:
    """Tell the number of the rank, as a tensor of one element.

    In a graph a number is the same for every rank, and this is not.
    """
    return _own(torch.arange(axis.size, device=device), 0, axis)


def check_tokens(x: Tensor, axis: RankOfAxis) -> None:
    """Raise PlanError if the tokens cannot be shared evenly."""
    given = f"sp=True shares tokens, dim {TOKENS}, among tp={axis.size} ranks, and the shape is "
    if x.dim() <= TOKENS:
        raise PlanError(f"{given}{tuple(x.shape)}, which has no such dim. Use sp=False.")
    tokens = x.shape[TOKENS]
    if tokens % axis.size:
        legal = [str(n) for n in range(2, 2 * axis.size + 1) if tokens % n == 0]
        of_tp = f"tp from {', '.join(legal)}, or " if legal else ""
        raise PlanError(
            f"{given}{tuple(x.shape)}. Choose {of_tp}a number of tokens that {axis.size} divides, "
            "or sp=False."
        )


def _apply(function: type[Function], x: Tensor, axis: RankOfAxis) -> Tensor:
    return cast("Tensor", cast("Any", function).apply(x, axis.group, axis.size, axis.rank))


class _Spread(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int, rank: int) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_reduce(gradient, ctx.group), None, None, None


class _SumUp(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int, rank: int) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient, None, None, None


class _GatherTokens(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int, rank: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _all_gather(x, TOKENS, group, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _reduce_scatter(gradient, ctx.group, ctx.size), None, None, None


class _SumOwnTokens(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int, rank: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _reduce_scatter(x, group, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_gather(gradient, TOKENS, ctx.group, ctx.size), None, None, None


class _OwnTokens(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int, rank: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _own(x, TOKENS, RankOfAxis(group, size, rank))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_gather(gradient, TOKENS, ctx.group, ctx.size), None, None, None


class _WholeTokens(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int, rank: int) -> Tensor:
        ctx.axis = RankOfAxis(group, size, rank)
        return _all_gather(x, TOKENS, group, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _own(gradient, TOKENS, ctx.axis), None, None, None


class _WholeFeatures(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int, rank: int) -> Tensor:
        ctx.axis = RankOfAxis(group, size, rank)
        return _all_gather(x, x.dim() - 1, group, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _own(gradient, gradient.dim() - 1, ctx.axis), None, None, None


_collectives: Any = torch.ops._c10d_functional  # pyright: ignore[reportPrivateUsage]


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return _collectives.wait_tensor(_collectives.all_reduce(x.contiguous(), "sum", group))


def _all_gather(x: Tensor, dim: int, group: str, size: int) -> Tensor:
    """Parts of all ranks side by side along a dim, in the order of ranks."""
    parts = _collectives.all_gather_into_tensor(x.contiguous(), size, group)
    parts = _collectives.wait_tensor(parts)
    if all(n == 1 for n in x.shape[:dim]):  # then they lie side by side already
        return parts.view([*x.shape[:dim], size * x.shape[dim], *x.shape[dim + 1 :]])
    return torch.cat(parts.chunk(size), dim)


def _reduce_scatter(x: Tensor, group: str, size: int) -> Tensor:
    """The sum over ranks, own tokens."""
    shape = [x.shape[0], x.shape[1] // size, *x.shape[2:]]
    if x.shape[0] == 1:
        parts = x.contiguous().view([size * shape[0], *shape[1:]])
    else:
        parts = torch.cat(x.chunk(size, TOKENS))
    return _collectives.wait_tensor(_collectives.reduce_scatter_tensor(parts, "sum", size, group))


def _own(x: Tensor, dim: int, axis: RankOfAxis) -> Tensor:
    return cast("Tensor", torch.ops.plait.own_part(x, dim, axis.size, axis.rank, axis.group))


@torch.library.custom_op("plait::own_part", mutates_args=())
def own_part(x: Tensor, dim: int, size: int, rank: int, group: str) -> Tensor:
    """Take the rank's share of a value that is equal on all ranks of the group.

    An operator of its own, so that passes can tell it from a slice that every rank takes alike, and
    the executor can give each rank its number.
    """
    length = x.shape[dim] // size
    # A copy, as the slice of a batch of one would keep the strides of the whole.
    return x.narrow(dim, rank * length, length).clone(memory_format=torch.contiguous_format)


@own_part.register_fake  # pyright: ignore[reportUnknownMemberType]
def _(x: Tensor, dim: int, size: int, rank: int, group: str) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= size
    return x.new_empty(shape)
