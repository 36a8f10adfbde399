"""Pointwise operators in strict numerics: a value does not depend on where in the tensor it lies.

PyTorch's CPU kernels take elements in whole vectors, and those left over one by one, for some
functions by other code with other roundings. Left over are the last elements of the tensor, and of
each thread's part of it. Here a tensor is filled up until every part is made of whole vectors.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._prims_common import (
    compute_elementwise_output_strides,
    is_non_overlapping_and_dense_or_false,
)

VECTOR_ELEMENTS = 64
"""Elements that the kernels' loops take at a time, at most: two registers of 64 bytes, of 2 bytes
each [ATen/native/cpu/Loops.h, vectorized_loop]."""
_GRAIN_ELEMENTS = 32768
"""Each thread gets at least so many [ATen/TensorIterator.h, GRAIN_SIZE]."""


@torch.library.custom_op("plait::strict_pointwise", mutates_args=())
def strict_pointwise(
    operator: str, tensors: Sequence[Tensor], numbers: Sequence[float], mode: str
) -> Tensor:
    """Run an operator of ATen, named as in "gelu.default", in whole vectors.

    tensors and numbers: its own, in the order of its schema; mode: its string, or "". Shape,
    strides and dtype of the result are those that the operator itself gives.
    """
    kernel = kernel_of(operator)
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    size = math.prod(shape)
    if tensors[0].device.type != "cpu" or size == 0 or not shape:
        return _call(kernel, tensors, numbers, mode)
    whole = filled_size(size, torch.get_num_threads())
    if whole == size and _lie_alike(tensors):
        return _call(kernel, tensors, numbers, mode)
    strides = compute_elementwise_output_strides(*(x.expand(shape) for x in tensors if x.dim()))
    flat = _call(kernel, [_filled(x, shape, strides, whole) for x in tensors], numbers, mode)
    result = torch.empty_strided(shape, strides, dtype=flat.dtype)
    return result.copy_(flat[:size].as_strided(shape, strides))


@strict_pointwise.register_fake
def _(operator: str, tensors: Sequence[Tensor], numbers: Sequence[float], mode: str) -> Tensor:
    return _call(kernel_of(operator), tensors, numbers, mode)


def kernel_of(operator: str) -> OpOverload:
    """The operator of that name in ATen."""
    name, _, overload = operator.partition(".")
    return getattr(getattr(torch.ops.aten, name), overload)


def filled_size(size: int, num_threads: int) -> int:
    """The next size from which every thread's part is made of whole vectors.

    Of `size` elements at most ceil(size / grain) threads take ceil(size / threads) each
    [ATen/ParallelOpenMP.h, invoke_parallel].
    """
    whole = 0
    while whole < size:
        whole = size
        parts = min(num_threads, -(-size // _GRAIN_ELEMENTS))
        size = -(-size // (parts * VECTOR_ELEMENTS)) * parts * VECTOR_ELEMENTS
    return whole


def _call(
    kernel: OpOverload, tensors: Sequence[Tensor], numbers: Sequence[float], mode: str
) -> Tensor:
    """Give each argument of the schema the next of its kind."""
    left_tensors, left_numbers = iter(tensors), iter(numbers)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for argument in kernel._schema.arguments:
        kind = str(argument.type)
        if kind == "Tensor":
            value: Any = next(left_tensors)
        elif kind == "str":
            value = mode
        else:
            value = bool(next(left_numbers)) if kind == "bool" else next(left_numbers)
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return kernel(*args, **kwargs)


def _lie_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernel sees one line of elements, without gaps or repeats."""
    first = tensors[0]
    return all(
        x.shape == first.shape
        and x.stride() == first.stride()
        and is_non_overlapping_and_dense_or_false(x)
        for x in tensors
    )


def _filled(x: Tensor, shape: torch.Size, strides: Sequence[int], whole: int) -> Tensor:
    """Copy into one line in the order of the result's memory, with ones at the end.

    A tensor without dims stays as it is: it has no part in the choice of the result's dtype.
    """
    if x.dim() == 0:
        return x
    flat = x.new_ones(whole)
    flat.as_strided(shape, strides).copy_(x)
    return flat
