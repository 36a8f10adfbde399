"""Results written over operands that die there, copies left out: fewer buffers, eager's bits."""

import pytest
import torch
from torch import nn

import plait


class Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.function(x, self.weight)


def compared(model, x, rewrite=lambda graph: graph):
    """The compiled step, whose loss and gradients have eager's bits. rewrite: what goes before."""

    def loss(model, x):
        return model(x).sum()

    schedule = plait.compile(rewrite(plait.capture(model, x, loss=loss)))
    value = plait.run(schedule, model, x)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = loss(model, x)
    expected.backward()
    assert torch.equal(value, expected)
    for gradient, p in zip(found, model.parameters(), strict=True):
        assert torch.equal(gradient, p.grad)
    return schedule


@pytest.mark.parametrize(
    ("function", "targets"),
    [
        (lambda x, w: x.sin() + w, ["sin", "add_"]),
        (lambda x, w: w * x.sin() + x.cos(), ["sin", "mul", "cos", "add_"]),  # w's gradient: sin
        (lambda x, w: (x + w) * 1.5 - x, ["add", "mul_", "sub_"]),
        (lambda x, w: x + w.sin().expand(4, 8), ["sin", "expand", "add"]),  # a view of less
        (lambda x, w: x * x.sin() + w, ["sin", "mul_", "add_"]),  # the second operand, in its place
        (lambda x, w: x - x.sin() - w, ["sin", "sub", "sub_"]),  # which cannot change places
        (lambda x, w: (y := x + w) + y, ["add", "add"]),
    ],
    ids=["sum", "saved", "number", "view", "second", "difference", "one value twice"],
)
def test_a_result_is_written_over_an_operand_that_dies_with_it(function, targets):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    schedule = compared(Block(function), x)
    (forward,) = (p for name, p in schedule.templates.items() if name.endswith(".forward"))
    assert [step.target.split(".")[1] for step in forward.steps] == [*targets, "sum"]


def test_the_gradient_of_a_square_takes_the_operand_and_no_copy_of_it():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    blocks = (Block(lambda x, w: (x * w).pow(2) - x) for _ in range(2))
    schedule = compared(nn.Sequential(*blocks), x)
    powers = {
        name: sum("pow" in step.target for step in program.steps)
        for name, program in schedule.templates.items()
    }
    assert all(count > 0 for name, count in powers.items() if name.endswith("forward"))
    assert not any(count for name, count in powers.items() if name.endswith("backward"))


def test_what_was_converted_before_is_not_converted_again():
    def twice(x, w):
        return (x.bfloat16() * w.bfloat16() + x.bfloat16().exp()).float()

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    schedule = compared(nn.Sequential(Block(twice), Block(twice)), x)
    (forward,) = (p for name, p in schedule.templates.items() if name.endswith(".forward"))
    conversions = sum("_to_copy" in step.target for step in forward.steps)
    assert conversions == 2 * 3  # of x, w and the result of each block
