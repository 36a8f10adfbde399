"""Root-mean-square normalization."""

import torch
from torch import Tensor, nn


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
