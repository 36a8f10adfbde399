"""Rotary embedding against its formula in float64, and against what models do."""

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.nn.rotary import Rope, rotate, rotation_tables
from plait.ops.rotary import reference_rotary, rotary
from tests.ops.exactness import TOLERANCES, check_exact, draw

# Inductor itself imports what PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def _tables(batch, tokens, size, dtype):
    # Halves that differ: no model has them, the transposed rotation must be right all the same.
    return (draw(batch, 1, tokens, size, dtype=dtype, seed=i).detach() for i in (3, 4))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", [8, 6], ids=["whole head", "part of a head"])
@pytest.mark.parametrize("batch", [1, 2], ids=["one table", "a table each"])
def test_turned_heads_and_gradients_are_the_formulas(dtype, size, batch):
    check_exact(
        rotary, reference_rotary, (draw(2, 3, 5, 8, dtype=dtype), *_tables(batch, 5, size, dtype))
    )


@pytest.mark.slow
def test_the_compiled_kernel_is_the_formula_too():
    by_tokens = draw(2, 90, 3, 64, dtype=torch.bfloat16)
    tables = _tables(1, 90, 48, torch.bfloat16)
    check_exact(
        lambda x, cos, sin: rotary(x.transpose(1, 2), cos, sin),
        lambda x, cos, sin: reference_rotary(x.transpose(1, 2), cos, sin),
        (by_tokens, *tables),
    )


def test_it_turns_as_models_do():
    x = draw(2, 3, 5, 8, dtype=torch.float32)
    tables = rotation_tables(Rope(), torch.arange(5)[None], 8)
    torch.testing.assert_close(rotary(x, *tables), rotate(x, *tables), rtol=1e-6, atol=1e-6)


def test_results_lie_by_tokens():
    turned = rotary(torch.zeros(2, 5, 3, 8).transpose(1, 2), *_tables(1, 5, 8, torch.float32))
    assert turned.transpose(1, 2).is_contiguous()


def test_the_operator_keeps_the_rules_of_torch_library():
    cos, sin = (draw(5, 6, dtype=torch.float32, seed=i).detach() for i in range(2))
    opcheck(torch.ops.plait.rotary.default, (draw(5, 3, 8, dtype=torch.float32), cos, sin))


def test_operands_that_do_not_fit_are_refused():
    x = torch.zeros(2, 3, 5, 8)
    for shape in ((1, 1, 4, 8), (3, 1, 5, 8), (1, 1, 5, 7), (1, 1, 5, 10), (1, 3, 5, 8)):
        with pytest.raises(ModelError, match="needs two tables"):
            rotary(x, torch.zeros(shape), torch.zeros(shape))
    with pytest.raises(ModelError, match="no gradient of its tables"):
        rotary(x, torch.zeros(1, 1, 5, 8, requires_grad=True), torch.zeros(1, 1, 5, 8))
