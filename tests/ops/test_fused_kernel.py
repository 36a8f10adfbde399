"""Kernels that Inductor writes for functions of tensors: when, for which forms, and when not."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from plait.ops.fused_kernel import SMALLEST, FusedKernel

# Inductor itself imports what PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

_WITHOUT_COMPILER = """
import warnings, torch
from plait.errors import CompilerWarning
from plait.ops.gated import reference_gated, swiglu
from plait.ops.rms_norm import rms_norm
x, weight = torch.randn(200, 256, requires_grad=True), torch.ones(256, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        torch.testing.assert_close(swiglu(x, x), reference_gated(x, x, "silu"))
        rms_norm(x, weight, eps=1e-6).sum().backward()
    told = [str(each.message) for each in caught if each.category is CompilerWarning]
assert len(told) == 2, told  # of the gate and the norm, which have two kernels each
assert all("runs operator by operator" in text and "CXX" in text for text in told), told
"""


def _scaled(x, factor):
    return (x * factor + 1.0,)


def test_small_operands_are_not_compiled_for():
    kernel = FusedKernel(_scaled)
    (found,) = kernel(torch.ones(4, 8), torch.full((8,), 2.0))
    assert torch.equal(found, torch.full((4, 8), 3.0))
    assert not kernel._kernels


def test_operands_without_values_go_through_the_function():
    kernel = FusedKernel(_scaled)
    with FakeTensorMode():
        (found,) = kernel(torch.ones(SMALLEST, 4), torch.ones(4))
    assert found.shape == (SMALLEST, 4)
    assert not kernel._kernels


@pytest.mark.slow
def test_one_kernel_serves_any_number_of_rows():
    kernel = FusedKernel(_scaled)
    factor = torch.randn(64)
    for num_rows in (SMALLEST // 64, 1111, 777):
        x = torch.randn(num_rows, 64)
        torch.testing.assert_close(kernel(x, factor)[0], x * factor + 1.0)
    assert len(kernel._kernels) == 1
    wide = torch.randn(SMALLEST // 64, 128)[:, :64]  # rows with gaps between them
    torch.testing.assert_close(kernel(wide, factor)[0], wide * factor + 1.0)
    turned = torch.randn(64, 999).T  # copied to rows, so the first kernel takes it
    torch.testing.assert_close(kernel(turned, factor)[0], turned * factor + 1.0)
    assert len(kernel._kernels) == 2


@pytest.mark.slow
def test_without_a_compiler_operators_run_one_by_one_and_one_warning_each_says_so(tmp_path):
    env = {**os.environ, "CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_COMPILER], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
