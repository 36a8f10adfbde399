"""Layer norm against its formula in float64."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops.layer_norm import layer_norm, reference_layer_norm
from tests.ops.exactness import TOLERANCES, check_exact, draw


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_norm_and_gradients_are_the_formulas(dtype, has_bias):
    operands = (draw(3, 7, 24, dtype=dtype), *(draw(24, dtype=dtype, seed=i) for i in range(2)))
    operands = operands if has_bias else operands[:2]
    check_exact(partial(layer_norm, eps=1e-6), partial(reference_layer_norm, eps=1e-6), operands)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_compiled_kernel_is_the_formula_too(dtype, has_bias):
    # Rows that do not divide by the threads, of whole vectors and a rest.
    operands = (draw(129, 331, dtype=dtype), *(draw(331, dtype=dtype, seed=i) for i in range(2)))
    operands = operands if has_bias else operands[:2]
    check_exact(partial(layer_norm, eps=1e-6), partial(reference_layer_norm, eps=1e-6), operands)


@pytest.mark.slow
def test_rows_far_from_zero_keep_their_variance():
    # The sum of squares less the square of the sum would lose much of it in float32.
    x = (1e3 + 4 * draw(200, 320, dtype=torch.float32).detach()).bfloat16().requires_grad_()
    weight = draw(320, dtype=torch.bfloat16)
    operands = x, weight
    check_exact(partial(layer_norm, eps=1e-6), partial(reference_layer_norm, eps=1e-6), operands)
    assert layer_norm(x[:0], weight, eps=1e-6).shape == (0, 320)


def test_the_operators_keep_the_rules_of_torch_library():
    x, weight, bias = (draw(*shape, dtype=torch.float32) for shape in ((5, 8), (8,), (8,)))
    for b in (bias, None):
        opcheck(torch.ops.plait.layer_norm.default, (x, weight, b, 1e-6))
    gradient, mean, scale = (draw(*shape, dtype=torch.float32) for shape in ((5, 8), (5,), (5,)))
    operands = tuple(t.detach() for t in (gradient, x, mean, scale, weight))
    opcheck(torch.ops.plait.layer_norm_backward.default, operands)


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="weight and bias of its last dim alone"):
        layer_norm(torch.zeros(4, 8), torch.ones(8), torch.ones(4), eps=1e-6)
