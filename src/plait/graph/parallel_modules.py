"""Subclasses of a model's own classes, which compute one rank's part.

The parameters of such a module are DTensors, or plain local tensors in a copy that is captured. Its
code sees the rank's part of them as plain tensors: each parameter has a property of its name, whose
gradient is summed over the ranks where each knows only a part of it.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plait.graph.exchange import Exchange, own_number, spread, sum_up

Forward = Callable[..., Any]


class Kind(Enum):
    """How the forward of a subclass relates to that of its base class."""

    AROUND = auto()  # the base's own, between two exchanges
    ROW = auto()  # the base's own without the bias, which is added to the sum
    LAYER = auto()  # AROUND, for the first of the layers only
    VOCABULARY = auto()
    WIDE_NORM = auto()


@dataclass(frozen=True)
class Form:
    """What a subclass does besides its base class.

    summed: names of the parameters whose gradients are summed over ranks. enter, leave: exchange of
    the first argument and of the result.
    """

    parameters: tuple[str, ...] = ()
    summed: frozenset[str] = frozenset()
    enter: Exchange | None = None
    leave: Exchange | None = None
    kind: Kind = Kind.AROUND


@cache
def parallel_class(base: type[nn.Module], form: Form) -> type[nn.Module]:
    """Make the subclass of `base` of this form: the same class for the same form."""
    members: dict[str, Any] = {
        name: property(_getter(name, name in form.summed)) for name in form.parameters
    }
    if form.kind is Kind.ROW:
        members["bias"] = None  # the base class must not add it
    members |= {"forward": _FORWARDS[form.kind](base, form), "__doc__": base.__doc__}
    return type(f"Parallel{base.__name__}", (base,), members)


def _local(module: Any, name: str, is_summed: bool) -> Any:
    parameter = module._parameters.get(name)
    if parameter is None:
        return None
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return spread(local, module.parallel_axis) if is_summed else local


def _getter(name: str, is_summed: bool) -> Forward:
    def get(self: nn.Module) -> Tensor | None:
        return _local(self, name, is_summed)

    return get


def _around(base: Any, form: Form) -> Forward:
    first = list(inspect.signature(base.forward).parameters)[1]
    enter, leave, is_layer = form.enter, form.leave, form.kind is Kind.LAYER

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if enter is None or (is_layer and not self.is_first_layer):
            pass
        elif args:
            args = (enter(args[0], self.parallel_axis), *args[1:])
        else:
            kwargs = {**kwargs, first: enter(kwargs[first], self.parallel_axis)}
        result = base.forward(self, *args, **kwargs)
        return result if leave is None else leave(result, self.parallel_axis)

    return forward


def _row(base: Any, form: Form) -> Forward:
    is_transposed = base.__name__ == "Conv1D"
    is_summed = "bias" in form.summed
    leave = cast("Exchange", form.leave)

    def forward(self: Any, x: Tensor) -> Tensor:
        partial = x @ self.weight if is_transposed else base.forward(self, x)
        whole = leave(partial, self.parallel_axis)
        bias = _local(self, "bias", is_summed)
        return whole if bias is None else whole + bias

    return forward


def _vocabulary(base: Any, form: Form) -> Forward:
    leave = cast("Exchange", form.leave)

    def forward(self: Any, tokens: Tensor) -> Tensor:
        num_own = self.weight.shape[0]
        places = tokens - own_number(self.parallel_axis, tokens.device) * num_own
        is_elsewhere = (places < 0) | (places >= num_own)
        found = base.forward(self, places.masked_fill(is_elsewhere, 0))
        return leave(found.masked_fill(is_elsewhere[..., None], 0.0), self.parallel_axis)

    return forward


def _wide_norm(base: Any, form: Form) -> Forward:
    def forward(self: Any, x: Tensor) -> Tensor:
        is_own = hasattr(self, "eps")  # Plait's; transformers' round the product, not the factor
        x_float = x.float()
        own = x_float.pow(2).mean(-1, keepdim=True)
        # Every rank's output depends on the sum, so its gradient is a sum too.
        mean = spread(sum_up(own, self.parallel_axis), self.parallel_axis) / self.parallel_axis.size
        normed = x_float * torch.rsqrt(mean + (self.eps if is_own else self.variance_epsilon))
        return self.weight * normed.to(x.dtype) if is_own else (self.weight * normed).to(x.dtype)

    return forward


_FORWARDS: dict[Kind, Callable[[Any, Form], Forward]] = {
    Kind.AROUND: _around,
    Kind.LAYER: _around,
    Kind.ROW: _row,
    Kind.VOCABULARY: _vocabulary,
    Kind.WIDE_NORM: _wide_norm,
}
