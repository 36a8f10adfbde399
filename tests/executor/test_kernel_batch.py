"""Kernels that are built together are each their own function; a wrong one is an error."""

import pytest
import torch

from plait.executor.kernel_batch import Kernel, KernelBatch, warm_up

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
SOURCE = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C" void kernel(float* out) {{ out[0] = {value}; }}
"""


@pytest.fixture(scope="module", autouse=True)
def inductor_is_imported():
    warm_up().result()


def kernel(value):
    return Kernel(["float*"], SOURCE.format(value=value))


@pytest.mark.parametrize("num_modules", [1, 2])
def test_each_kernel_computes_its_own_and_comes_to_its_place(num_modules):
    kernels = [kernel(float(i)) for i in range(3)]
    scope = {f"name_{i}": each for i, each in enumerate(kernels)}
    KernelBatch([*kernels, kernel(2.0)], [scope]).build(num_modules)
    out = torch.empty(1)
    for i in range(3):
        scope[f"name_{i}"](out)
        assert out.item() == i
        assert not isinstance(scope[f"name_{i}"], Kernel)


def test_a_kernel_that_is_no_c_plus_plus_is_an_error_and_leaves_all_places_alone():
    good, wrong = kernel(1.0), kernel("no value")
    scope = {"good": good, "wrong": wrong}
    with pytest.raises(Exception, match="no value"):
        KernelBatch([good, wrong], [scope]).build(1)
    assert scope == {"good": good, "wrong": wrong}
