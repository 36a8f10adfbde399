"""What an operator has to do at least: the bound that its time is held against."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Work:
    """Arithmetic and traffic.

    flops: an addition or a multiplication counts one. bytes: each operand read once, each result
    written once.
    """

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":
        """Of both, one after the other."""
        return Work(flops=self.flops + other.flops, bytes=self.bytes + other.bytes)


def num_bytes(*tensors: Tensor | None) -> int:
    """Bytes of all elements."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def pointwise_work(flops_each: int, size: Tensor, *moved: Tensor | None) -> Work:
    """flops_each for each element of a tensor, and all that is read or written."""
    return Work(flops=flops_each * size.numel(), bytes=num_bytes(*moved))


WIDE = {torch.float64: torch.float64}
"""In which dtype sums and functions are computed, where it is not float32."""


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 if it is that."""
    return x.to(WIDE.get(x.dtype, torch.float32))
