"""A function of tensors as one kernel, written by TorchInductor when it is first needed.

Islands (`executor/islands.py`) and the operators of this package are made here by the same call.
What Inductor makes it keeps in its own cache on disk, so that the next process only loads it.
"""

# pyright: basic
# (TorchInductor is not typed.)

import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_double, c_int64, c_void_p
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from plait.errors import CompilerWarning
from plait.ops.numerics import without_autocast

# Inductor takes a second to import, and most programs do without it: it is imported where needed.

_SETTINGS = {
    "size_asserts": False,  # whoever calls the kernel knows the forms of its operands
    "alignment_asserts": False,
    "scalar_asserts": False,
    # Elements for each thread at least. To wake a thread takes as long as thousands of additions.
    "cpp.min_chunk_size": 4096,
    "pattern_matcher": False,  # it looks for what islands do not hold, and learns how for a second
}
SMALLEST = 2**15
"""Elements of the largest operand below which operators one by one are as fast as a kernel."""
_FIRST_MANY = 2  # PyTorch takes sizes of 0 and 1 for constants, all others for any size


def compile_kernel(
    function: Callable,
    operands: Callable[[FakeTensorMode], Sequence[Tensor]],
    *,
    is_inference: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> Callable[[list[Tensor]], tuple[Tensor, ...]]:
    """Compile a function that returns a tuple: the kernel takes its operands in a list.

    operands: makes fake tensors of the forms that will come. settings: of Inductor, beside ours.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    mode = FakeTensorMode(shape_env=ShapeEnv())
    given = operands(mode)
    with tracing(TracingContext(mode)), torch.no_grad():
        with mode:  # what a function makes of nothing is fake too
            module = make_fx(function, select_decomp_table())(*given)
        _keep_strides(module)
        with config.patch({**_SETTINGS, **(settings or {})}):
            compiled = compile_fx_inner(module, given, is_inference=is_inference)
    return getattr(compiled, "current_callable", None) or compiled


class FusedKernel:
    """A function of tensors and constants that returns a tuple of tensors, run as one kernel.

    The first dim of the first operand counts rows. A kernel serves any number of them; it is
    written anew for other widths, strides, dtypes and constants. Small operands, and all where no
    compiler works (one warning), go through the function itself, operator by operator.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        """Wait for the first operands."""
        self.function = function
        self._kernels: dict[tuple, Callable] = {}

    def __call__(self, *operands: Tensor, **constants: object) -> Sequence[Tensor]:
        """Run on tensors without gradients; results are contiguous."""
        operands = tuple(x if _lies_in_rows(x) else x.contiguous() for x in operands)
        num_rows = operands[0].shape[0]
        if num_rows < _FIRST_MANY or not pays(*operands):
            return self.function(*operands, **constants)
        is_rows = [x.dim() > 0 and x.shape[0] == num_rows for x in operands]
        key = (
            *(
                (x.shape[n:], x.stride(), x.dtype, x.device, n)
                for x, n in zip(operands, is_rows, strict=True)
            ),
            *constants.items(),
        )
        kernel = self._kernels.get(key)
        if kernel is None:
            kernel = self._kernels[key] = self._compiled(operands, is_rows, constants)
        return kernel(list(operands))

    def _compiled(
        self, operands: Sequence[Tensor], is_rows: Sequence[bool], constants: Mapping[str, object]
    ) -> Callable[[list[Tensor]], Sequence[Tensor]]:
        def function(*operands: Tensor) -> tuple[Tensor, ...]:
            return self.function(*operands, **constants)

        def fakes(mode: FakeTensorMode) -> list[Tensor]:
            return [_fake(x, mode, n) for x, n in zip(operands, is_rows, strict=True)]

        # One kernel is built here, not by the pool of processes that Inductor keeps for many.
        try:
            with without_autocast(operands[0].device.type):
                return compile_kernel(function, fakes, settings={"compile_threads": 1})
        except Exception as error:  # Inductor raises what its parts raise, here in one warning
            _warn(self.function, error)
            return lambda operands: function(*operands)


_CPP = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>
static inline float wide(float x) { return x; }
static inline float wide(uint16_t x) {  // bfloat16: the upper half of a float32
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
static inline void narrow(float x, float* y) { *y = x; }
static inline void narrow(float x, uint16_t* y) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  *y = is_nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
// Within 2^-22 of it, infinite from 88.73 on: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], with
// the coefficients of expf in the Cephes library (S. L. Moshier).
static inline float exponential(float x) {
  x = 88.8f < x ? 88.8f : x;  // not a number stays so
  x = -87.3f > x ? -87.3f : x;
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounded, by the lost bits
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return (p * r * r + r + 1.0f) * power;
}
"""


class CppKernel:
    """A kernel in C++ where what Inductor writes is slow, and the function that it stands for.

    The source has `extern "C"` functions, one for each of its dtypes, that take addresses, then
    sizes, then a double; a loop that may be vectorized says so (`omp simd`). Before it stand `wide`
    and `narrow`, from a dtype to float and back, and `exponential`. A machine without a working
    compiler is told so once.
    """

    def __init__(
        self,
        function: Callable,
        source: str,
        *,
        dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    ) -> None:
        """Wait for the first use. dtypes: of those that the source has functions for."""
        self.function, self.source = function, _CPP + source
        self.dtypes = dtypes
        self._library: Any = None

    def takes(self, first: Tensor) -> bool:
        """Whether there is a function for the first tensor's dtype and device, and it pays."""
        return self.serves(first) and pays(first)

    def serves(self, first: Tensor) -> bool:
        """Whether there is a function for the first tensor's dtype and device."""
        return first.device.type == "cpu" and first.dtype in self.dtypes

    def run(
        self,
        name: str,
        tensors: Sequence[Tensor | None],
        sizes: Sequence[int],
        *,
        dtype: torch.dtype,
        number: float = 0.0,
    ) -> bool:
        """Call the function `name_dtype` of the source, compiled at the first call.

        False if it cannot be compiled.
        """
        if not self._is_loaded():
            return False
        addresses = (c_void_p(None if x is None else x.data_ptr()) for x in tensors)
        function = getattr(self._library, f"{name}_{_CPP_DTYPES[dtype]}")
        function(*addresses, *map(c_int64, sizes), c_double(number))
        return True

    def _is_loaded(self) -> bool:
        if self._library is None:
            from torch._inductor.codecache import CppCodeCache

            try:
                # Inductor writes vectors itself, and forbids the compiler to find any, or to fuse.
                # An operation that could trap keeps a choice between two values a branch, and its
                # loop in scalars. Inductor turns traps off, and on again by a flag behind that.
                flags = ["-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-trapping-math"]
                if platform.machine() in ("x86_64", "AMD64"):  # where they are that wide
                    flags.append("-mprefer-vector-width=512")
                self._library = CppCodeCache.load(self.source, extra_flags=flags)
            except Exception as error:  # what the C++ compiler raises: there is none that works
                _warn(self.function, error)
                self._library = False
        return self._library is not False


_CPP_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@cache
def triton_kernels() -> Any:
    """The module of kernels in Triton, None where Triton is not installed."""
    # By name, as an optional dependency is imported: only where it is installed and needed.
    return import_module("plait.ops.triton_kernels") if find_spec("triton") else None


_told: set[str] = set()


def _warn(function: Callable, error: Exception) -> None:
    """Once for each module, whatever kernels it has."""
    if function.__module__ in _told:
        return
    _told.add(function.__module__)
    lines = str(error).strip().splitlines() or [""]
    warnings.warn(
        f"{function.__module__} runs operator by operator, as its kernel cannot be "
        f"compiled ({type(error).__name__}: {lines[0]}). Install g++, or name a compiler in the "
        "environment variable CXX.",
        CompilerWarning,
        stacklevel=3,
    )


def pays(*operands: Tensor) -> bool:
    """Whether a kernel is worth its compilation: operands have values, and enough of them."""
    has_values = not any(isinstance(x, FakeTensor) for x in operands)
    return has_values and max(x.numel() for x in operands) >= SMALLEST


def _lies_in_rows(x: Tensor) -> bool:
    """Whether rows are contiguous and follow each other, with or without gaps."""
    if x.is_contiguous():
        return True
    return x[0].is_contiguous() and x.stride(0) >= x[0].numel()


def rows_of(x: Tensor) -> Tensor:
    """As a matrix of its last dim, without a view that autograd would go through for nothing."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _fake(x: Tensor, mode: FakeTensorMode, is_rows: bool) -> Tensor:
    sizes = [DimDynamic.STATIC] * x.dim()
    if is_rows:
        sizes[0] = DimDynamic.DYNAMIC
    # Detached: of a tensor with a history its gradient would be asked for, with a warning.
    symbols = StatelessSymbolicContext(dynamic_sizes=sizes)
    return mode.from_tensor(x.detach(), symbolic_context=symbols)


def _keep_strides(module: torch.fx.GraphModule) -> None:
    """Ask that results have the strides for which what follows was traced."""
    from torch._inductor.compile_fx import record_original_output_strides

    output: Any = module.graph.output_node()
    output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
    record_original_output_strides(module)
