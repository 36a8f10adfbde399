"""A small model with repeated blocks, dropout and a buffer, and its captured training step."""

import torch
from torch import nn

from plait.graph.capture import capture
from plait.graph.graph import Graph

WIDTH = 6


class Block(nn.Module):
    """A residual layer with dropout."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the layer's part."""
        return x + self.dropout(self.down(torch.relu(self.up(self.norm(x)))))


class Tower(nn.Module):
    """Blocks, then a scaled projection."""

    def __init__(self, num_layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))
        self.head = nn.Linear(WIDTH, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, WIDTH) to (B, 4)."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x) * self.scale


def mean_square(model: nn.Module, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the model."""
    return (model(x) - wanted).square().mean()


def captured_step(num_layers: int = 4) -> Graph:
    """The joint graph of a training step of a tower."""
    torch.manual_seed(0)
    model = Tower(num_layers)
    return capture(model, torch.randn(5, WIDTH), torch.randn(5, 4), loss=mean_square)
