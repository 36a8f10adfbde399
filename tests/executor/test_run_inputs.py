"""plait.run takes the inputs that were captured, and says which of them is not."""

import pytest
import torch
from torch import nn

import plait
from plait.errors import PlanError
from plait.graph.storage import from_json, to_json


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, scale=1, unused=None):
        return self.linear(x) * scale


def scheduled(*inputs):
    torch.manual_seed(0)
    model = Scaled()
    schedule = plait.compile(plait.capture(model, *inputs))
    return from_json(to_json(schedule)), model


X = torch.ones(2, 4)


def test_inputs_too_many_are_refused():
    schedule, model = scheduled(X)
    with pytest.raises(PlanError, match=r"a tensor\. Given: a tensor, a tensor, 'nonsense'"):
        plait.run(schedule, model, X, X, "nonsense")


def test_an_input_that_is_missing_is_named():
    schedule, model = scheduled(X)
    with pytest.raises(PlanError, match=r"captured with .*: a tensor\. Given: none"):
        plait.run(schedule, model)


def test_an_input_that_is_not_a_tensor_is_named():
    schedule, model = scheduled(X)
    with pytest.raises(PlanError, match="input 0 is 3, which is not a tensor"):
        plait.run(schedule, model, 3)


def test_a_tensor_in_the_place_of_a_number_is_refused():
    schedule, model = scheduled(X, 3)
    with pytest.raises(PlanError, match="input 1 is a tensor"):
        plait.run(schedule, model, X, X)


def test_a_number_is_part_of_the_program_and_may_be_left_out():
    schedule, model = scheduled(X, 3)
    assert torch.equal(plait.run(schedule, model, X, 3), model(X, 3))
    assert torch.equal(plait.run(schedule, model, X), model(X, 3))
    with pytest.raises(PlanError, match=r"input 1 is 4.*captured with 3"):
        plait.run(schedule, model, X, 4)


def test_a_tensor_that_the_program_does_not_read_may_be_given():
    schedule, model = scheduled(X, 2, X)
    assert torch.equal(plait.run(schedule, model, X, 2, X), model(X, 2))
