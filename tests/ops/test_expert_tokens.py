"""Tokens to experts and back, against a walk through the experts."""

import pytest
import torch

from plait.errors import ModelError
from plait.ops.expert_tokens import (
    expert_order,
    gather_rows,
    mix_rows,
    reference_gather_rows,
    route,
)
from tests.ops.exactness import TOLERANCES, check_exact, draw

CHOSEN = torch.tensor([[2, 0], [0, 3], [3, 2], [2, 3], [0, 2]])  # nobody chooses expert 1


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_rows_are_sorted_by_expert_and_send_gradients_back(dtype):
    order = expert_order(CHOSEN, 4)
    assert order.ends_E.tolist() == [3, 3, 7, 10]
    check_exact(
        lambda x: gather_rows(x, order),
        lambda x: reference_gather_rows(x, CHOSEN),
        (draw(5, 6, dtype=dtype),),
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_mixed_rows_are_the_weighted_sums(dtype):
    order = expert_order(CHOSEN, 4)

    def reference(rows, weights):
        mixed = torch.zeros(5, 6, dtype=rows.dtype)
        for row, source in zip(rows, order.order_R.tolist(), strict=True):
            token, choice = divmod(source, 2)
            mixed = mixed.index_add(0, torch.tensor([token]), (row * weights[token, choice])[None])
        return mixed

    check_exact(
        lambda rows, weights: mix_rows(rows, weights, order),
        reference,
        (draw(10, 6, dtype=dtype), draw(5, 2, dtype=dtype)),
    )


def test_the_best_experts_are_chosen_with_weights_that_add_up_to_one():
    scores = draw(7, 6, dtype=torch.float32)
    weights, chosen = route(scores, 2)
    expected = scores.softmax(-1).topk(2, -1)
    assert torch.equal(chosen, expected.indices)
    torch.testing.assert_close(weights, expected.values / expected.values.sum(-1, keepdim=True))
    torch.autograd.gradcheck(lambda x: route(x, 2)[0], scores.double(), eps=1e-2, atol=1e-3)


def test_a_bias_changes_the_choice_and_not_the_weights():
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    weights, chosen = route(scores, 1, bias_E=torch.tensor([9.0, 0.0, 0.0]), normalize=False)
    assert chosen.tolist() == [[0]]
    assert weights.item() == 0.5


def test_experts_outside_the_best_group_are_not_chosen():
    scores = torch.tensor([[5.0, 0.0, 4.0, 3.9]])
    assert route(scores, 2)[1].tolist() == [[0, 2]]
    in_group = route(scores, 2, bias_E=torch.zeros(4), num_groups=2, groups_per_token=1)[1]
    assert in_group.tolist() == [[2, 3]]  # a sigmoid router adds a group's two best


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="2 experts to choose from"):
        route(torch.zeros(5, 4), 3, num_groups=2)
    with pytest.raises(ModelError, match="3 equal groups"):
        route(torch.zeros(5, 4), 1, num_groups=3)
    order = expert_order(CHOSEN, 4)
    with pytest.raises(ModelError, match="a row for each of 5 tokens"):
        gather_rows(torch.zeros(4, 6), order)
    with pytest.raises(ModelError, match="a row for each of"):
        mix_rows(torch.zeros(9, 6), torch.zeros(5, 2), order)
