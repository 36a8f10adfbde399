"""SwiGLU and GeGLU against PyTorch's activations in float64."""

import math
from functools import partial

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops.gated import geglu, reference_gated, swiglu
from tests.ops.exactness import TOLERANCES, check_exact, draw

# Inductor itself imports what PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

GATES = {
    "silu": swiglu,
    "gelu": geglu,
    "gelu_tanh": partial(geglu, approximate="tanh"),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", GATES)
def test_gates_and_gradients_are_the_formulas(dtype, kind):
    operands = (draw(3, 7, 24, dtype=dtype), draw(3, 7, 24, dtype=dtype, seed=1))
    check_exact(GATES[kind], partial(reference_gated, kind=kind), operands)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", GATES)
def test_the_compiled_kernels_are_the_formulas_too(kind, dtype):
    operands = (draw(99, 333, dtype=dtype), draw(99, 333, dtype=dtype, seed=1))
    check_exact(GATES[kind], partial(reference_gated, kind=kind), operands)


@pytest.mark.slow
@pytest.mark.parametrize("kind", GATES)
def test_the_compiled_kernels_have_the_limits_of_the_functions(kind):
    gate = torch.cat([torch.linspace(-200, 200, 2**16), torch.tensor([-math.inf, math.nan])])
    gate = gate[:, None].requires_grad_()
    exact = gate.detach().double().requires_grad_()
    up = torch.ones_like(gate)
    found, wanted = GATES[kind](gate, up), reference_gated(exact, up.double(), kind)
    found.sum().backward()
    wanted.sum().backward()
    # The normal distribution is approximated to 1.5e-7, and multiplied by at most 6 where it is
    # neither 0 nor 1; far out a value is as small as it should be, not in proportion.
    torch.testing.assert_close(found.double()[:-2], wanted[:-2], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gate.grad.double()[:-2], exact.grad[:-2], rtol=2e-6, atol=2e-6)
    assert found[-1].isnan()
    assert gate.grad[-1].isnan()


@pytest.mark.slow
def test_rows_with_gaps_are_read_where_they_lie():
    both = draw(99, 2 * 333, dtype=torch.bfloat16)
    check_exact(
        lambda both: swiglu(*both.chunk(2, dim=-1)),
        lambda both: reference_gated(*both.chunk(2, dim=-1), kind="silu"),
        (both,),
    )


def test_halves_of_one_tensor_need_no_copy_before():
    both = draw(5, 48, dtype=torch.float32)
    check_exact(
        lambda both: swiglu(*both.chunk(2, dim=-1)),
        lambda both: reference_gated(*both.chunk(2, dim=-1), kind="silu"),
        (both,),
    )


@pytest.mark.parametrize("kind", GATES)
def test_the_operator_keeps_the_rules_of_torch_library(kind):
    operands = (draw(5, 8, dtype=torch.float32), draw(5, 8, dtype=torch.float32, seed=1))
    opcheck(torch.ops.plait.gated.default, (*operands, kind))


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match="two operands of one shape"):
        swiglu(torch.zeros(4, 8), torch.zeros(4, 6))
    with pytest.raises(ModelError, match="one floating-point dtype"):
        geglu(torch.zeros(4, 8), torch.zeros(4, 8).bfloat16())
