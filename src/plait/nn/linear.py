"""Linear layers of either numerics."""

from torch import Tensor, nn

from plait.ops.numerics import Numerics
from plait.ops.strict_linear import strict_linear


class StrictLinear(nn.Module):
    """The parameters of `torch.nn.Linear`, multiplied in strict numerics."""

    def __init__(self, in_size: int, out_size: int, *, bias: bool) -> None:
        """Make weight (out, in) and bias (out,), drawn as `torch.nn.Linear` draws them."""
        super().__init__()
        drawn = nn.Linear(in_size, out_size, bias=bias)
        self.weight = drawn.weight
        self.bias = drawn.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return strict_linear(x, self.weight, self.bias)


def make_linear(
    in_size: int, out_size: int, *, bias: bool, numerics: Numerics
) -> nn.Linear | StrictLinear:
    """Make a linear layer; the names and initial values of its parameters are the same in both."""
    if numerics == "strict":
        return StrictLinear(in_size, out_size, bias=bias)
    return nn.Linear(in_size, out_size, bias=bias)
