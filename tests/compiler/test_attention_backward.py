"""PyTorch's backward of causal attention gives way to ours where ours serves, and nowhere else."""

import pytest
import torch
from torch import nn

import plait
from plait.ops.numerics import bfloat16_pays

OURS, PYTORCHS = "plait.flash_backward", "_flash_attention_for_cpu_backward"


class Attention(nn.Module):
    """One layer, four query heads on two key-value heads; scale=None is PyTorch's own."""

    def __init__(self, *, is_causal=True, scale=None, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(64, 128, dtype=dtype)
        self.kv = nn.Linear(64, 128, dtype=dtype)
        self.is_causal, self.scale = is_causal, scale

    def forward(self, x):
        split = (*x.shape[:2], -1, 32)
        q = self.q(x).view(split).transpose(1, 2)
        k, v = self.kv(x).view(split).transpose(1, 2).chunk(2, dim=1)
        return nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=self.is_causal, scale=self.scale, enable_gqa=True
        )


def scheduled(model, x, **settings):
    captured = plait.capture(model, x, loss=lambda model, x: model(x).float().square().sum())
    return plait.compile(captured, **settings)


def operators(schedule):
    programs = (*schedule.programs.values(), *schedule.templates.values())
    return " ".join(step.target for program in programs for step in program.steps)


@pytest.mark.skipif(not bfloat16_pays("cpu"), reason="this CPU has no units for bfloat16")
@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_gradients_in_bfloat16_come_from_our_kernel(level, scale):
    x = torch.randn(2, 70, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    model, eager = Attention(scale=scale), Attention(scale=scale)
    schedule = scheduled(model, x, level=level)
    if level == "O1":  # at O2 it is inside of the one island
        assert OURS in operators(schedule)
    assert PYTORCHS not in operators(schedule)
    plait.run(schedule, model, x)
    eager(x).float().square().sum().backward()
    for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        difference = (mine.grad.float() - theirs.grad.float()).norm() / theirs.grad.float().norm()
        assert difference < 2**-6  # each is rounded to 2^-9 a few times


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (Attention(), {"level": "O0"}),
        (Attention(is_causal=False), {"level": "O1"}),
        (Attention(dtype=torch.float64), {"level": "O1"}),
        (Attention(), {"level": "O1", "numerics": "strict"}),
    ],
    ids=["O0", "not causal", "float64", "strict"],
)
def test_elsewhere_the_kernel_is_not_ours(model, settings):
    x = torch.zeros(2, 70, 64, dtype=model.q.weight.dtype)
    assert OURS not in operators(scheduled(model, x, **settings))
