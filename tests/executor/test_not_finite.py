import pytest
import torch
from torch import nn

from plait.executor.not_finite import NotFiniteFound, NotFiniteSearch
from plait.executor.observe import Lookout
from plait.executor.outcome import outcome_of
from plait.executor.run import Runnable


def searched(captured, *, stop=False):
    search = NotFiniteSearch(stop=stop)
    outcome_of(
        Runnable(captured.schedule, Lookout(captured.schedule, [search.step], [search.arrival])),
        captured.inputs,
    )
    return search


class Function(nn.Module):
    """A function of x under a parameter, so that there is a backward."""

    def __init__(self, function):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.function = function

    def forward(self, x):
        return self.function(x * self.scale)


def test_finite_numbers_give_no_finding(blocks):
    search = searched(blocks)
    assert search.findings == []
    assert str(search) == "No step made NaN, or Inf of finite values."


def test_the_step_that_makes_nan_is_named_with_its_layer_line_and_operands(blocks):
    with torch.no_grad():
        blocks.model.blocks[1].up.bias.fill_(-100)
    found = searched(blocks).first_nan
    assert found.operator == "aten.div.Tensor"
    assert "share = h / h.sum(-1, keepdim=True)" in found.source
    lines = str(found).splitlines()
    assert lines[0] == "NaN was made by"
    assert "call 1 of 2 of Block_1.forward (blocks.1), in the program forward, run 1" in lines[2]
    assert lines[4].strip().startswith("took relu = f32[4, 16]  0 to 0")
    assert lines[-1].strip() == "made f32[4, 16]  64 NaN (of 64 elements)"


def test_it_can_stop_the_run_there(blocks):
    with torch.no_grad():
        blocks.model.blocks[2].up.bias.fill_(-100)
    with pytest.raises(NotFiniteFound, match="forward/block_1_forward_1/div"):
        searched(blocks, stop=True)


def test_nan_of_a_gradient_names_the_forward_line(make):
    # d sqrt(x)/dx = Inf at 0, and 0 * Inf is NaN.
    captured = make(Function(lambda x: (x.sqrt() * (x > 0)).sum()), torch.tensor([0.0, 4.0]))
    search = searched(captured)
    assert search.first_nan.step.startswith("backward/")
    assert "x.sqrt() * (x > 0)" in search.first_nan.source


def test_an_overflow_is_found_before_the_nan_that_follows(make):
    def softmax(x):
        h = x.exp()
        return (h / h.sum()).sum()

    captured = make(Function(softmax), torch.tensor([1.0, 100.0]))
    overflow, nan = searched(captured).findings[:2]
    assert (overflow.kind, overflow.operator) == ("Inf", "aten.exp.default")
    assert (nan.kind, nan.operator) == ("NaN", "aten.div.Tensor")


@torch.no_grad()
def test_a_mask_of_infinities_is_meant(make):
    def attend(x):
        mask = torch.full((4, 4), float("-inf")).triu(1)
        return ((x @ x.T).masked_fill(x.sum() > 1e9, -torch.inf) + mask).softmax(-1)

    torch.manual_seed(0)
    assert searched(make(Function(attend), torch.randn(4, 4))).findings == []


def test_nan_that_comes_in_is_told_with_the_name_of_the_parameter(blocks):
    with torch.no_grad():
        blocks.model.blocks[2].down.weight[0, 0] = torch.nan
    found = searched(blocks).first_nan
    assert found.input == "blocks.2.down.weight"
    assert str(found).startswith("NaN came in with blocks.2.down.weight, first taken by")
    assert "1 NaN" in str(found)


def test_memory_that_nobody_wrote_yet_is_no_finding(make):
    class Fill(nn.Module):
        def forward(self, x):
            return torch.empty_like(x).copy_(x) + 1

    captured = make(Fill(), torch.ones(3))
    assert searched(captured).findings == []
