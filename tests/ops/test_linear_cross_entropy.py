"""Fused linear cross-entropy against PyTorch's two steps."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops import linear_cross_entropy as module
from plait.ops.linear_cross_entropy import linear_cross_entropy, reference_linear_cross_entropy


@pytest.fixture(params=["one-group", "many-groups"])
def sizes(request, monkeypatch):
    """Rows, width and vocabulary; the second time with groups and blocks of a few rows."""
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


def test_the_operator_keeps_the_rules_of_torch_library():
    inputs = _inputs((20, 8, 30))
    opcheck(torch.ops.plait.linear_cross_entropy.default, (*inputs, torch.float32, True))


def test_operands_that_do_not_fit_are_refused():
    hidden, weight, targets = _inputs((20, 8, 30))
    for given in ((hidden[:, :7], weight, targets), (hidden, weight, targets[:19])):
        with pytest.raises(ModelError, match="needs hidden states"):
            linear_cross_entropy(*given)
