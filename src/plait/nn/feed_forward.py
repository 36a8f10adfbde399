"""Gated feed-forward layer (SwiGLU)."""

from torch import Tensor, nn
from torch.nn import functional

from plait.nn.linear import make_linear
from plait.ops.numerics import Numerics
from plait.ops.strict_silu import strict_silu


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) [Shazeer 2020, arXiv:2002.05202, eq. 5]."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool, numerics: Numerics = "fast"
    ) -> None:
        """Make the three projections."""
        super().__init__()
        self.activation = strict_silu if numerics == "strict" else functional.silu
        self.gate_proj = make_linear(hidden_size, intermediate_size, bias=bias, numerics=numerics)
        self.up_proj = make_linear(hidden_size, intermediate_size, bias=bias, numerics=numerics)
        self.down_proj = make_linear(intermediate_size, hidden_size, bias=bias, numerics=numerics)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
