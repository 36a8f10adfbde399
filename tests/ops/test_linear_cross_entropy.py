"""Fused linear cross-entropy against PyTorch's two steps."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops import linear_cross_entropy as module
from plait.ops.linear_cross_entropy import (
    linear_cross_entropy,
    pays_to_wait,
    reference_linear_cross_entropy,
)


@pytest.fixture(params=["one-group", "many-groups", "few-rows"])
def sizes(request, monkeypatch):
    """Rows, width and vocabulary; the second time with groups and blocks of a few rows.

    Of few rows the logits are smaller than the weight, whose gradient then waits for the backward.
    """
    if request.param == "few-rows":
        return 19, 24, 97
    if request.param == "many-groups":
        monkeypatch.setattr(module, "GROUP_ELEMENTS", 40 * 97)
        monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 7 * 97)
    return 133, 24, 97


def _inputs(sizes, dtype=torch.float32):
    rows, width, vocab = sizes
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    return hidden, weight, targets


def _run(function, inputs):
    loss = function(*inputs)
    return loss, torch.autograd.grad(loss * 0.25, inputs[:2])


def test_loss_and_gradients_equal_the_reference(sizes):
    inputs = _inputs(sizes)
    loss, gradients = _run(linear_cross_entropy, inputs)
    expected, expected_gradients = _run(reference_linear_cross_entropy, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_a_soft_cap_bounds_the_logits_and_their_gradients(sizes):
    inputs = _inputs(sizes)
    loss, gradients = _run(partial(linear_cross_entropy, soft_cap=3.0), inputs)
    reference = partial(reference_linear_cross_entropy, soft_cap=3.0)
    expected, expected_gradients = _run(reference, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_targets_below_zero_are_left_out(sizes):
    hidden, weight, targets = _inputs(sizes)
    targets[::3] = -100
    loss, gradients = _run(linear_cross_entropy, (hidden, weight, targets))
    expected, expected_gradients = _run(reference_linear_cross_entropy, (hidden, weight, targets))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)
    assert torch.equal(gradients[0][::3], torch.zeros_like(gradients[0][::3]))


def test_bfloat16_products_stay_within_their_rounding(sizes):
    hidden, weight, targets = _inputs(sizes)
    loss = linear_cross_entropy(hidden, weight, targets, dtype=torch.bfloat16)
    exact = reference_linear_cross_entropy(hidden.double(), weight.double(), targets)
    # A logit of size |x| is rounded by 2^-9 |x|; over 133 rows the signs average out.
    assert abs(loss - exact) / exact < 2**-9


def test_a_target_of_vanishing_probability_has_a_finite_loss():
    hidden, weight = torch.full((1, 1), 300.0), torch.tensor([[1.0], [-1.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    assert loss.item() == pytest.approx(600.0)


def test_without_gradients_the_loss_is_the_same():
    inputs = _inputs((50, 8, 30))
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*inputs), linear_cross_entropy(*inputs).detach())


@pytest.mark.parametrize("switches", [(), (0.0, True, True), (3.0, False)], ids=str)
def test_the_operator_keeps_the_rules_of_torch_library(switches):
    inputs = _inputs((20, 8, 30))
    operator = torch.ops.plait.linear_cross_entropy.default
    opcheck(operator, (*inputs, torch.float32, True, *switches))


def test_only_logits_that_are_smaller_than_the_weight_and_one_group_are_kept(monkeypatch):
    def kept(rows):
        hidden, weight, _ = _inputs((rows, 24, 97))
        return pays_to_wait(hidden, weight, torch.float32)

    assert [kept(rows) for rows in (0, 23, 24)] == [False, True, False]
    monkeypatch.setattr(module, "GROUP_ELEMENTS", 22 * 97)
    assert [kept(rows) for rows in (22, 23)] == [True, False]


def test_one_graph_serves_batches_of_any_number_of_rows():
    compiled = torch.compile(
        linear_cross_entropy, dynamic=True, backend="aot_eager", fullgraph=True
    )
    for rows in (19, 50, 133):
        inputs = _inputs((rows, 24, 97))
        with torch.compiler.set_stance("fail_on_recompile" if rows > 19 else "default"):
            found, gradients = _run(compiled, inputs)
        expected, expected_gradients = _run(reference_linear_cross_entropy, inputs)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_operands_that_do_not_fit_are_refused():
    hidden, weight, targets = _inputs((20, 8, 30))
    for given in ((hidden[:, :7], weight, targets), (hidden, weight, targets[:19])):
        with pytest.raises(ModelError, match="needs hidden states"):
            linear_cross_entropy(*given)


@pytest.mark.parametrize("rows", [19, 133])  # the weight's gradient in the backward, and before
def test_under_autocast_products_run_in_its_dtype(rows):
    hidden, weight, targets = _inputs((rows, 24, 97))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
        gradients = torch.autograd.grad(loss, (hidden, weight))
    expected = linear_cross_entropy(hidden, weight, targets, dtype=torch.bfloat16)
    assert torch.equal(loss, expected)
    assert [x.dtype for x in gradients] == [torch.float32, torch.float32]
    for found, wanted in zip(
        gradients, torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        assert torch.equal(found, wanted)
