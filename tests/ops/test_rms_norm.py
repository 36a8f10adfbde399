"""RMS norm with and without a residual, against its formula in float64."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops.rms_norm import add_rms_norm, reference_rms_norm, rms_norm, rms_norm_work
from tests.ops.exactness import TOLERANCES, check_exact, draw

# Inductor itself imports what PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def _reference_with_sum(x, residual, weight, **settings):
    return reference_rms_norm(x, weight, residual=residual, **settings), x + residual


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_and_gradients_are_the_formulas(dtype, offset):
    x, weight = draw(3, 7, 24, dtype=dtype), draw(24, dtype=dtype)
    settings = {"eps": 1e-6, "offset": offset}
    check_exact(partial(rms_norm, **settings), partial(reference_rms_norm, **settings), (x, weight))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_with_a_residual_both_results_send_gradients_back(dtype):
    operands = (draw(21, 24, dtype=dtype), draw(21, 24, dtype=dtype, seed=5), draw(24, dtype=dtype))
    reference = partial(_reference_with_sum, eps=1e-6)
    check_exact(partial(add_rms_norm, eps=1e-6), reference, operands)


@pytest.mark.parametrize("used", [0, 1], ids=["the norm alone", "the sum alone"])
def test_a_result_that_nobody_uses_has_no_say_in_the_gradients(used):
    operands = [draw(21, 24, dtype=torch.float64, seed=i).requires_grad_() for i in (0, 5)]
    weight = draw(24, dtype=torch.float64).requires_grad_()
    found, expected = (
        torch.autograd.grad(
            function(*operands, weight, eps=1e-6)[used].square().sum(),
            (*operands, weight),
            materialize_grads=True,
        )
        for function in (add_rms_norm, lambda x, r, w, eps: _reference_with_sum(x, r, w, eps=eps))
    )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_compiled_kernels_are_the_formulas_too(dtype):
    for num_rows in (300, 129):  # one kernel for both; rows that do not divide by the threads
        shape = (num_rows, 331)  # whole vectors and a rest
        operands = (draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=5))
        weight = draw(shape[1], dtype=dtype)
        reference = partial(_reference_with_sum, eps=1e-6)
        check_exact(partial(add_rms_norm, eps=1e-6), reference, (*operands, weight))
        check_exact(
            partial(rms_norm, eps=1e-6),
            partial(reference_rms_norm, eps=1e-6),
            (operands[0], weight),
        )


def test_gradients_pass_a_finite_difference_check():
    x, weight = draw(4, 6, dtype=torch.float64), draw(6, dtype=torch.float64)
    torch.autograd.gradcheck(partial(rms_norm, eps=1e-6), (x, weight))


def test_the_operator_keeps_the_rules_of_torch_library():
    x, weight = draw(5, 8, dtype=torch.float32), draw(8, dtype=torch.float32)
    for residual in (None, draw(5, 8, dtype=torch.float32, seed=1)):
        opcheck(torch.ops.plait.rms_norm.default, (x, residual, weight, 1e-6, 0.0))


def test_operands_that_do_not_fit_are_refused():
    x = torch.zeros(4, 8)
    with pytest.raises(ModelError, match=r"weight of its last dim alone, got \(4,\)"):
        rms_norm(x, torch.ones(4), eps=1e-6)
    with pytest.raises(ModelError, match="residual of the shape of x"):
        add_rms_norm(x, torch.zeros(3, 8), torch.ones(8), eps=1e-6)
    with pytest.raises(ModelError, match="one floating-point dtype"):
        rms_norm(x, torch.ones(8).bfloat16(), eps=1e-6)


def test_work_counts_each_operand_and_result_once():
    x, weight = torch.zeros(4, 8), torch.ones(8)
    forward, backward = rms_norm_work(x, weight, x)
    assert forward.bytes == 4 * (4 * 32 + 8)  # two read, two written, the weight
    assert backward.bytes == 4 * (4 * 32 + 2 * 8)  # three read, one written; weight and gradient
