"""Normalization over the last dim."""

from typing import Literal

import torch
from torch import Tensor, nn

NormKind = Literal["rms", "rms_plus_one", "layer"]


class RMSNorm(nn.Module):
    """Scale rows to unit root mean square, then by a weight [Zhang & Sennrich 2019, eq. 4].

    The statistics are float32 whatever the input; the result has the input's dtype.
    """

    def __init__(self, size: int, *, eps: float) -> None:
        """Make a norm over the last dim, of `size` elements."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dim."""
        x_float = x.float()
        normed = x_float * torch.rsqrt(x_float.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class RMSNormPlusOne(nn.Module):
    """The same with a factor of 1 + weight, applied in float32, as Gemma's checkpoints want it."""

    def __init__(self, size: int, *, eps: float) -> None:
        """Make a norm over the last dim, of `size` elements."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dim."""
        x_float = x.float()
        normed = x_float * torch.rsqrt(x_float.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


def make_norm(kind: NormKind, size: int, *, eps: float) -> nn.Module:
    """Make a norm; "layer" has mean and bias too [Ba et al. 2016]."""
    match kind:
        case "rms":
            return RMSNorm(size, eps=eps)
        case "rms_plus_one":
            return RMSNormPlusOne(size, eps=eps)
        case "layer":
            return nn.LayerNorm(size, eps=eps)
