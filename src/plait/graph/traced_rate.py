"""A learning rate whose arithmetic is remembered, so that it can be an input of a traced program.

Kernels take their numbers as constants. A constant that was computed of the rate is found again by
its value: the rate is odd enough that nothing else has it.
"""

# pyright: basic
# (The functions of `operator` are generic.)

import operator
from collections.abc import Callable
from typing import Any

_FORWARD: tuple[Callable[..., float], ...] = (
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.pow,
)


class Rate(float):
    """A number made of a learning rate: `how` is the function and operands, None of the rate."""

    how: tuple[Callable[..., float], tuple[float, ...]] | None
    known: "dict[float, Rate]"

    def __new__(
        cls,
        value: float,
        known: "dict[float, Rate]",
        how: tuple[Callable[..., float], tuple[float, ...]] | None = None,
    ) -> "Rate":
        """Make one and add it to `known`, by its value."""
        made = super().__new__(cls, value)
        made.how, made.known = how, known
        return known.setdefault(value, made)

    def __neg__(self) -> float:
        return self._computed(operator.neg, self)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return float, (float(self),)

    def _computed(self, function: Callable[..., float], *operands: float) -> float:
        value = function(*(float(x) for x in operands))
        return Rate(value, self.known, (function, operands))


def _define(function: Callable[..., float]) -> None:
    name = function.__name__

    def of(self: Rate, other: object) -> Any:
        known = isinstance(other, (int, float))
        return self._computed(function, self, other) if known else NotImplemented

    def reflected(self: Rate, other: object) -> Any:
        known = isinstance(other, (int, float))
        return self._computed(function, other, self) if known else NotImplemented

    setattr(Rate, f"__{name}__", of)
    setattr(Rate, f"__r{name}__", reflected)


for _function in _FORWARD:
    _define(_function)
