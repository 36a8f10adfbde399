"""A model of three blocks, the second of which can be made to go wrong, and its schedule."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import plait
from plait.graph.graph import Role
from plait.graph.schedule import Schedule


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x):
        h = torch.relu(self.up(self.norm(x)))
        share = h / h.sum(-1, keepdim=True)  # 0 / 0 where no unit is active
        return x + self.down(self.dropout(share))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@dataclass
class Captured:
    """A model, its schedule, and what `Runnable` takes."""

    model: nn.Module
    schedule: Schedule
    inputs: list[Tensor]


def capture(model, *inputs):
    schedule = plait.compile(plait.capture(model, *inputs))
    state = dict(model.named_parameters()) | dict(model.named_buffers())
    bound = [
        inputs[int(value.name)] if value.role is Role.INPUT else state[value.name]
        for value in schedule.inputs
        if value.role is not Role.TANGENT
    ]
    return Captured(model, schedule, bound)


@pytest.fixture
def make():
    return capture


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    return capture(Model(), torch.randn(4, 8))
