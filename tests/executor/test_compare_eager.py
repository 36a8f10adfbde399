import pytest
import torch
from torch import nn

import plait
from plait.executor.compare_eager import compare_with_eager

pytestmark = [
    # Dynamo makes an instance of an autograd function where it meets one.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.factor = factor

    def forward(self, x):
        h = torch.tanh(self.linear(x))
        if torch.compiler.is_compiling():
            h = h * self.factor
        return x + torch.dropout(h, 0.5, train=True)


class Model(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(factor) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().sum(), x.mean()


def compared(model, **options):
    torch.manual_seed(1)
    x = torch.randn(4, 8, requires_grad=True)
    return compare_with_eager(model, plait.jit(model, cache=False), x, **options)


def test_equal_programs_are_equal_in_results_and_steps():
    torch.manual_seed(0)
    comparison = compared(Model())
    assert comparison.differing == {}
    assert comparison.num_equal == 9  # two outputs, the input's gradient, six parameters'
    assert comparison.steps.num_equal > 30
    assert comparison.steps.found == ""
    assert str(comparison).startswith("9 outputs and gradients are eager's, bit for bit")


def test_a_wrong_step_is_named_with_what_eager_made_instead():
    torch.manual_seed(0)
    comparison = compared(Model(1.25))
    assert len(comparison.differing) == 9
    assert "aten.mul.Tensor" in comparison.steps.found
    assert "h = h * self.factor" in comparison.steps.found
    assert "(blocks.0.linear), in the program forward" in comparison.steps.found
    assert "the nearest, made by aten.tanh.default" in comparison.steps.found


def test_a_small_deviation_passes_where_a_tolerance_is_given():
    torch.manual_seed(0)
    model = Model(1 + 2e-7)
    assert compared(model).steps.found != ""
    torch._dynamo.reset()
    comparison = compared(model, rtol=1e-4)
    assert comparison.differing == {}
    assert comparison.steps.found == ""
    assert comparison.steps.num_close > 0


def test_buffers_begin_alike_and_change_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    assert compared(model).differing == {}
    assert int(model[1].num_batches_tracked) == 1


def test_what_was_compiled_before_is_compared_in_its_results_only():
    torch.manual_seed(0)
    model = Model()
    compiled = plait.jit(model, cache=False)
    x = torch.randn(4, 8, requires_grad=True)
    compiled(x)
    comparison = compare_with_eager(model, compiled, x)
    assert comparison.steps is None
    assert comparison.differing == {}
    assert "it had been compiled before" in str(comparison)
