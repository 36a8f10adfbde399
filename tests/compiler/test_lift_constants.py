"""Layers that differ in a number share a template, and keep their bits."""

import torch
from torch import nn

import plait
from plait.compiler.lift_constants import lift_constants
from plait.graph.verify import verify
from plait.graph.verify_schedule import verify_schedule


class Layer(nn.Module):
    def __init__(self, scale: float, dropout: float = 0.0):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return x + self.dropout(self.down(torch.tanh(self.up(x) * self.scale))) / (1 + self.scale)


def squares(model, x):
    return model(x).square().sum()


def model_of(*scales: float, dropouts: tuple[float, ...] = ()) -> nn.Module:
    torch.manual_seed(0)
    given = dropouts or (0.0,) * len(scales)
    return nn.Sequential(*(Layer(s, d) for s, d in zip(scales, given, strict=True)))


def num_layer_templates(graph) -> int:
    return sum(template.block == "Layer" for template in graph.templates.values())


def assert_eager_bits(model, x, graph):
    schedule = plait.compile(graph)
    verify_schedule(schedule)
    torch.manual_seed(1)
    expected = squares(model, x)
    expected.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(1)
    assert torch.equal(plait.run(schedule, model, x), expected)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_layers_that_differ_in_a_number_share_a_template():
    model, x = model_of(1.0, 0.5, 0.25, 0.125), torch.randn(3, 8, requires_grad=True)
    graph = plait.capture(model, x, loss=squares)
    assert num_layer_templates(graph) == 4
    lifted = lift_constants(graph)
    verify(lifted)
    assert num_layer_templates(lifted) == 1
    assert num_layer_templates(graph) == 4
    assert_eager_bits(model, x, graph)


def test_a_number_that_changes_the_operators_keeps_its_template():
    model = model_of(0.5, 0.5, 0.5, dropouts=(0.1, 0.2, 0.0))
    x = torch.randn(3, 8, requires_grad=True)
    graph = plait.capture(model, x, loss=squares)
    assert num_layer_templates(lift_constants(graph)) == 2
    assert_eager_bits(model, x, graph)


def test_layers_that_are_alike_are_left_alone():
    graph = plait.capture(model_of(0.5, 0.5, 0.5), torch.randn(3, 8), loss=squares)
    assert lift_constants(graph) is graph
