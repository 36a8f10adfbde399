"""Operators that PyTorch writes out while it traces, though eager has a kernel for them."""

# pyright: basic
# (Tables of operators are not typed.)

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload

_KEYS = (DispatchKey.Autograd, DispatchKey.CompositeImplicitAutograd)
_PREFIXES = ("upsample_", "_upsample_")


@contextmanager
def kernels_of_eager() -> Iterator[None]:
    """Trace resizing of images as eager computes it: written out, it sums in another order."""
    taken = [
        (operator, key, operator.py_kernels.pop(key))
        for operator in _written_out()
        for key in _KEYS
        if key in operator.py_kernels
    ]
    _forget_choices()
    try:
        yield
    finally:
        for operator, key, kernel in taken:
            operator.py_kernels[key] = kernel
        _forget_choices()


@cache
def _written_out() -> tuple[OpOverload, ...]:
    packets = (getattr(torch.ops.aten, n) for n in dir(torch.ops.aten) if n.startswith(_PREFIXES))
    overloads = [getattr(packet, name) for packet in packets for name in packet.overloads()]
    return tuple(x for x in overloads if any(key in x.py_kernels for key in _KEYS))


def _forget_choices() -> None:
    for operator in _written_out():
        operator._dispatch_cache.clear()
