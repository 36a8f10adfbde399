"""Fused linear cross-entropy against PyTorch's two steps."""

import math
from functools import partial

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops import linear_cross_entropy as module
from plait.ops import row_losses
from plait.ops.linear_cross_entropy import (
    is_one_group,
    linear_cross_entropy,
    reference_linear_cross_entropy,
)


@pytest.fixture(params=["one-group", "many-groups"])
def sizes(request, monkeypatch):
    """Rows, width and vocabulary; the second time with groups and blocks of a few rows."""
    if request.param == "many-groups":
        monkeypatch.setattr(module, "GROUP_ELEMENTS", 40 * 97)
        monkeypatch.setattr(row_losses, "_BLOCK_ELEMENTS", 7 * 97)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_of_a_group_has_a_gradient_of_its_own(dtype):
    hidden, weight, targets = _inputs((133, 24, 97), dtype)
    scale = torch.rand(133, generator=torch.Generator().manual_seed(1))
    switches = (dtype, True, 0.0, True)
    losses, _, _ = torch.ops.plait.linear_cross_entropy_rows(hidden, weight, targets, *switches)
    found = torch.autograd.grad((losses * scale).sum(), (hidden, weight))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, targets, reduction="none")
    expected = torch.autograd.grad((exact * scale).sum(), wide)
    # A rounded logit of size 10 moves a probability by 1e-6, in bfloat16 by 4 %.
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    for mine, truth in zip((losses, *found), (exact, *expected), strict=True):
        assert (mine.double() - truth).norm() / truth.norm() < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft_cap", [None, 3.0])
def test_the_compiled_kernel_is_the_formula_too(dtype, soft_cap, monkeypatch):
    monkeypatch.setattr(row_losses, "_SMALLEST_COMPILED", 0)
    hidden, weight, targets = _inputs((133, 24, 1003), dtype)  # whole vectors and a rest
    targets[::7] = -100
    loss, gradients = _run(
        partial(linear_cross_entropy, soft_cap=soft_cap), (hidden, weight, targets)
    )
    assert row_losses._kernel._library, "no compiler"

    def in_double(hidden, weight, targets):
        logits = hidden @ weight.T
        logits = logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact, expected = _run(in_double, (*wide, targets))
    # A rounded logit of size 10 moves a probability by 1e-6, in bfloat16 by 4 %.
    tolerance = 1e-6 if dtype is torch.float32 else 5e-2
    assert abs(loss.double() - exact) / exact < tolerance
    for mine, truth in zip(gradients, expected, strict=True):
        assert (mine.double() - truth).norm() / truth.norm() < tolerance
    with torch.no_grad():
        without = linear_cross_entropy(hidden, weight, targets, soft_cap=soft_cap)
    assert torch.equal(without, loss)


@pytest.mark.slow
def test_the_compiled_kernel_takes_logits_that_underflow_and_that_are_none(monkeypatch):
    monkeypatch.setattr(row_losses, "_SMALLEST_COMPILED", 0)
    logits = torch.zeros(3, 40)
    logits[0, 0], logits[1, 7], logits[2, 3] = 300.0, -torch.inf, torch.nan
    targets = torch.tensor([1, 0, 0])
    losses = row_losses.losses_to_gradients(logits, targets, True, 0.0)
    assert losses[0].item() == pytest.approx(300.0)
    assert losses[1].item() == pytest.approx(math.log(39))
    assert logits[1, 7] == 0
    assert losses[2].isnan()


@pytest.mark.parametrize("smallest_compiled", [0, 2**20], ids=["compiled", "operators"])
def test_a_vanishing_probability_has_no_gradient_instead_of_a_subnormal_one(
    smallest_compiled, monkeypatch
):
    monkeypatch.setattr(row_losses, "_SMALLEST_COMPILED", smallest_compiled)
    logits = -torch.arange(64.0).repeat(4, 1) * 1.4  # to e^-88
    row_losses.losses_to_gradients(logits, torch.zeros(4, dtype=torch.int64), True, 0.0)
    assert (logits[:, 1:48] > 1e-30).all()
    assert not logits[:, 50:].any()


def test_a_target_that_is_no_class_is_refused(sizes):
    hidden, weight, targets = _inputs(sizes)
    targets[100] = 97
    with pytest.raises(ModelError, match="target 97 is none of 97 classes"):
        linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_threads", [1, 2])
def test_in_strict_numerics_a_row_has_the_same_bits_alone(dtype, num_threads):
    hidden, weight, targets = (x.detach() for x in _inputs((133, 1056, 515), dtype))
    targets[7], hidden[7] = 3, hidden[7] * 100  # a probability that underflows, in one row only

    def made(rows):
        switches = (dtype, True, 5.0, True, True)
        operator = torch.ops.plait.linear_cross_entropy_rows
        return operator(hidden[rows], weight, targets[rows], *switches)

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        parts = zip(made(slice(0, 50)), made(slice(50, 133)), strict=True)
        for whole, part in zip(made(slice(0, 133)), parts, strict=True):
            assert torch.equal(whole, torch.cat(part))
    finally:
        torch.set_num_threads(before)


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


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("linear_cross_entropy", ()),
        ("linear_cross_entropy", (3.0, False)),
        ("linear_cross_entropy_rows", ()),
        ("linear_cross_entropy_rows", (3.0, False)),
        ("linear_cross_entropy_rows", (0.0, True, True)),
    ],
    ids=str,
)
def test_the_operators_keep_the_rules_of_torch_library(name, switches):
    inputs = _inputs((20, 8, 30))
    operator = getattr(torch.ops.plait, name).default
    opcheck(operator, (*inputs, torch.float32, True, *switches))


def test_only_logits_of_one_group_are_kept(monkeypatch):
    monkeypatch.setattr(module, "GROUP_ELEMENTS", 22 * 97)
    found = [is_one_group(*_inputs((rows, 24, 97))[:2]) for rows in (0, 1, 22, 23)]
    assert found == [False, True, True, False]


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


def test_under_autocast_products_run_in_its_dtype(sizes):
    hidden, weight, targets = _inputs(sizes)
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
