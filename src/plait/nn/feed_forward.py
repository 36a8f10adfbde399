"""Feed-forward layers: gated (SwiGLU, GeGLU) or plain."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from plait.nn.linear import StrictLinear, make_linear
from plait.ops.numerics import Numerics
from plait.ops.strict_silu import strict_silu

Activation = Literal["silu", "gelu", "gelu_tanh"]
FeedForwardKind = Literal["gated", "gated_fused", "plain"]


class FeedForward(nn.Module):
    """down(f(gate(x)) * up(x)) [Shazeer 2020, arXiv:2002.05202, eq. 5], or plainly down(f(up(x))).

    "gated_fused" holds gate and up in one matrix, gate first, as some checkpoints do.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        numerics: Numerics = "fast",
        activation: Activation = "silu",
        kind: FeedForwardKind = "gated",
    ) -> None:
        """Make the projections."""
        super().__init__()
        self.activation = _activation(activation, numerics)
        self.kind: FeedForwardKind = kind

        def project(in_size: int, out_size: int) -> nn.Linear | StrictLinear:
            return make_linear(in_size, out_size, bias=bias, numerics=numerics)

        if kind == "gated_fused":
            self.gate_up_proj = project(hidden_size, 2 * intermediate_size)
        else:
            if kind == "gated":
                self.gate_proj = project(hidden_size, intermediate_size)
            self.up_proj = project(hidden_size, intermediate_size)
        self.down_proj = project(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        if self.kind == "plain":
            return self.down_proj(self.activation(self.up_proj(x)))
        if self.kind == "gated_fused":
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(self.activation(gate) * up)
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


def _activation(name: Activation, numerics: Numerics) -> Callable[[Tensor], Tensor]:
    match name:
        case "silu":
            return strict_silu if numerics == "strict" else functional.silu
        case "gelu":
            return functional.gelu
        case "gelu_tanh":
            return partial(functional.gelu, approximate="tanh")
