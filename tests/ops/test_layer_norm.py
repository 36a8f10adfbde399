"""Layer norm against its formula in float64."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops.layer_norm import layer_norm, reference_layer_norm
from tests.ops.exactness import TOLERANCES, check_exact, draw

# Inductor itself imports what PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_norm_and_gradients_are_the_formulas(dtype, has_bias):
    operands = (draw(3, 7, 24, dtype=dtype), *(draw(24, dtype=dtype, seed=i) for i in range(2)))
    operands = operands if has_bias else operands[:2]
    check_exact(partial(layer_norm, eps=1e-6), partial(reference_layer_norm, eps=1e-6), operands)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_compiled_kernels_are_the_formula_too(dtype, has_bias):
    for num_rows in (300, 129):  # rows that do not divide by the threads
        x = draw(num_rows, 331, dtype=dtype) + 3  # whole vectors and a rest; a mean to be taken off
        operands = (x, *(draw(331, dtype=dtype, seed=i) for i in range(2)))
        operands = operands if has_bias else operands[:2]
        check_exact(
            partial(layer_norm, eps=1e-6), partial(reference_layer_norm, eps=1e-6), operands
        )


def test_gradients_pass_a_finite_difference_check():
    x, weight, bias = (draw(*shape, dtype=torch.float64) for shape in ((4, 6), (6,), (6,)))

    def normed(*operands):
        return torch.ops.plait.layer_norm(*operands, 1e-6)[0]

    torch.autograd.gradcheck(normed, (x, weight, bias))


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_operator_keeps_the_rules_of_torch_library(has_bias):
    x, weight, bias = (draw(*shape, dtype=torch.float32) for shape in ((5, 8), (8,), (8,)))
    opcheck(torch.ops.plait.layer_norm.default, (x, weight, bias if has_bias else None, 1e-6))


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="weight and bias of its last dim alone"):
        layer_norm(torch.zeros(4, 8), torch.ones(8), torch.ones(4), eps=1e-6)
