"""Pointwise operators in whole vectors: right, and blind to where an element lies."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from plait.ops.strict_pointwise import VECTOR_ELEMENTS, filled_size, strict_pointwise

GRAIN = 32768


def parts_of(size, num_threads):
    """How ATen shares elements among threads [ATen/ParallelOpenMP.h, invoke_parallel]."""
    parts = min(num_threads, -(-size // GRAIN))
    chunk = -(-size // parts)
    return [min(chunk, size - start) for start in range(0, size, chunk)]


@given(st.integers(1, 10**7), st.integers(1, 200))
def test_every_thread_gets_whole_vectors_and_little_is_added(size, num_threads):
    whole = filled_size(size, num_threads)
    assert all(part % VECTOR_ELEMENTS == 0 for part in parts_of(whole, num_threads))
    assert size <= whole < size + 2 * VECTOR_ELEMENTS * num_threads
    assert filled_size(whole, num_threads) == whole


FORMS = {
    "contiguous": lambda: [torch.randn(7, 33), torch.randn(7, 33)],
    "transposed": lambda: [torch.randn(33, 7).t(), torch.randn(33, 7).t()],
    "one-transposed": lambda: [torch.randn(7, 33), torch.randn(33, 7).t()],
    "part-of-rows": lambda: [torch.randn(7, 80)[:, :33], torch.randn(7, 80)[:, 5:38]],
    "broadcast": lambda: [torch.randn(7, 33), torch.randn(33)],
    "without-dims": lambda: [torch.randn(()), torch.randn(())],
    "empty": lambda: [torch.randn(0, 33), torch.randn(0, 33)],
    "one-element": lambda: [torch.randn(1), torch.randn(1)],
    "whole": lambda: [torch.randn(2, 64), torch.randn(2, 64)],
}


@pytest.mark.parametrize("form", FORMS)
def test_result_has_the_operator_s_values_and_form(form):
    torch.manual_seed(0)
    dy, x = FORMS[form]()
    found = strict_pointwise("gelu_backward.default", [dy, x], [], "tanh")
    expected = torch.ops.aten.gelu_backward(dy, x, approximate="tanh")
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()


def test_numbers_flags_and_dtypes_reach_the_operator():
    x = torch.rand(5, 7)
    call = strict_pointwise
    assert torch.equal(call("pow.Tensor_Scalar", [x], [2.0], ""), x**2)
    assert torch.equal(call("pow.Scalar", [x], [2.0], ""), torch.pow(2.0, x))
    torch.testing.assert_close(call("add.Tensor", [x, x], [3.0], ""), 4 * x)
    for is_result in (True, False):
        expected = torch.ops.aten.elu_backward(x, 1.0, 2.0, 1.0, is_result, x - 0.5)
        found = call("elu_backward.default", [x, x - 0.5], [1.0, 2.0, 1.0, float(is_result)], "")
        torch.testing.assert_close(found, expected)
    half, scalar = x.bfloat16(), torch.tensor(0.5)
    assert call("pow.Tensor_Tensor", [half, scalar], [], "").dtype == torch.bfloat16


def test_the_operator_keeps_the_rules_of_torch_library():
    x = torch.rand(5, 7)
    opcheck(torch.ops.plait.strict_pointwise.default, ("pow.Tensor_Scalar", [x], [1.5], ""))
