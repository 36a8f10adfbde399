"""The operators that gradients are made of keep the rules of torch.library, as those forward do."""

from importlib import import_module

import pytest
import torch
from torch.library import opcheck

MODULES = "attention gated grouped_linear rms_norm strict_attention strict_linear strict_silu"
for module in MODULES.split():
    import_module(f"plait.ops.{module}")  # which registers its operators
_plait = torch.ops.plait


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


HEADS = tuple(draw(1, 2, 70, 16) + i for i in range(4))  # dout, q, k, v
ENDS = torch.tensor([3, 3, 8])
OPERANDS = {
    "blocked_causal_attention_backward": (*HEADS, 0.3),
    "strict_causal_attention_backward": (*HEADS, 0.3),
    "gated_backward": (draw(6, 8), draw(6, 8) + 1, draw(6, 8) + 2, "silu"),
    "grouped_linear_backward": (draw(8, 5), draw(8, 4), draw(3, 5, 4), ENDS),
    "rms_norm_backward": (draw(5, 8), draw(5, 8), draw(5, 8), draw(5), draw(8), 0.0),
    "strict_silu_backward": (draw(5, 8), draw(5, 8)),
    "strict_batched_linear": (draw(3, 5, 8), draw(3, 6, 8)),
}


@pytest.mark.parametrize("name", OPERANDS)
def test_it_keeps_the_rules(name):
    opcheck(getattr(_plait, name).default, OPERANDS[name])
