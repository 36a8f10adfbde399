"""Gated feed-forward layer (SwiGLU)."""

from torch import Tensor, nn
from torch.nn import functional


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)) [Shazeer 2020, arXiv:2002.05202, eq. 5]."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        """Make the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
