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


def test_the_kernel_keeps_the_rules_of_torch_library():
    x, weight, bias = (draw(*shape, dtype=torch.float32) for shape in ((5, 8), (8,), (8,)))
    opcheck(torch.ops.aten.native_layer_norm.default, (x, [8], weight, bias, 1e-6))


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="weight and bias of its last dim alone"):
        layer_norm(torch.zeros(4, 8), torch.ones(8), torch.ones(4), eps=1e-6)
