"""Fewer passes over the tokens, with eager's bits."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import plait
from plait.compiler.spread_late import spread_late
from tests.compiler.test_in_place import Block, compared


def of_squares(x, w):
    """As a norm does."""
    return x * w * (x * w).pow(2).mean(-1, keepdim=True)


class ByNumber(TorchDispatchMode):
    """Notes how many values each product or quotient with a number has."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name.rstrip("_") in ("aten::mul", "aten::div") and "Scalar" in str(func):
            self.counts.append(result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_gradient_of_a_mean_of_squares_is_doubled_before_it_is_spread(dtype):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    blocks = nn.Sequential(Block(of_squares), Block(of_squares)).to(dtype)
    # A double of float16 may be beyond its greatest number; what is spread is divided before.
    schedule = compared(blocks, x, spread_late)
    with ByNumber() as seen:
        plait.run(schedule, blocks, x)
    assert sorted(seen.counts) == ([4, 4, 32, 32] if dtype is torch.float16 else [4] * 4)


@pytest.mark.parametrize("scale", [1e-41, 1e-20, 1e20, 1e37])
def test_doubles_are_exact_of_small_and_large_values(scale):
    x = scale * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    block = Block(lambda x, w: (x + w * scale).pow(2).mean(-1, keepdim=True))
    compared(nn.Sequential(block), x, spread_late)
