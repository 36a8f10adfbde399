"""One matrix for each group of rows, against a matrix for each row."""

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops.grouped_linear import grouped_linear, reference_grouped_linear

ENDS = {"all groups": [3, 4, 11, 20], "empty groups": [0, 9, 9, 20], "one group": [0, 0, 0, 20]}


def _inputs(ends, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 7, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, 5, 7, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.tensor(ends)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_products_and_gradients_equal_the_reference(ends):
    x, weight, ends = _inputs(ends)
    dout = torch.randn(20, 5, generator=torch.Generator().manual_seed(1)).double()
    found, expected = grouped_linear(x, weight, ends), reference_grouped_linear(x, weight, ends)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, weight), dout),
        torch.autograd.grad(expected, (x, weight), dout),
        rtol=1e-12,
        atol=1e-12,
    )


def test_autocast_reaches_the_products():
    x, weight, ends = _inputs(ENDS["all groups"], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = grouped_linear(x, weight, ends)
    assert output.dtype == torch.bfloat16
    (dweight,) = torch.autograd.grad(output.float().sum(), weight)
    assert dweight.dtype == torch.float32


def test_the_operator_keeps_the_rules_of_its_kind():
    opcheck(torch.ops.plait.grouped_linear.default, _inputs(ENDS["empty groups"], torch.float32))


def test_operands_that_do_not_fit_are_refused():
    x, weight, ends = _inputs(ENDS["all groups"])
    for given in ((x[:, :6], weight, ends), (x, weight[:3], ends), (x, weight, ends.int())):
        with pytest.raises(ModelError, match="grouped_linear needs rows"):
            grouped_linear(*given)
