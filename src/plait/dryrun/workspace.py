"""What kernels allocate beside their results, and free again before they end.

A kernel written in Python is run on fake tensors, and its memory noted. Those of ATen are described
here by what their C++ allocates (torch 2.13, files below aten/src/ATen/native).
"""

# pyright: basic
# (Operators' arguments are not typed.)

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS

from plait.dryrun.memory_trace import Kind
from plait.dryrun.watch_memory import EagerMemory
from plait.ops.linear_cross_entropy import GROUP_ELEMENTS

_NOT_OURS = ("aten", "prims", "_c10d_functional", "c10d", "streams", "rngprims", "fsdp")


@dataclass
class Workspace:
    """Bytes that a kernel allocates at most at one time. num_threads: of the rank."""

    num_threads: int = 1
    known: dict[object, int] = field(default_factory=dict[object, int])

    def __call__(
        self, target: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> int:
        """Of an operator named as in a schedule, on fake tensors."""
        packet, _, _ = target.rpartition(".")
        rule = _RULES.get(packet)
        if rule is not None:
            return rule(self, args, kwargs, result)
        namespace, _, name = packet.partition(".")
        if namespace in _NOT_OURS or f"{namespace}::{name}" not in OPDEFS:
            return 0
        key = (target, *(_form(x) for x in args), *((k, _form(x)) for k, x in kwargs.items()))
        if key not in self.known:
            self.known[key] = self.python_kernel(f"{namespace}::{name}", args, kwargs)
        return self.known[key]

    def python_kernel(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Run the kernel on fakes; what it looks at is taken to be zero."""
        watch = EagerMemory(self)
        watch.adopt((args, kwargs), Kind.INPUTS)
        with watch, torch.no_grad():
            result = OPDEFS[name]._init_fn(*args, **kwargs)
            yielded = watch.num_bytes(result)
        before = sum(each.num_bytes for each in watch.trace.storages if each.moment < 0)
        peak = max((live for _, live in watch.trace.curve()), default=0)
        return max(0, peak - before - yielded)


def _form(x: Any) -> object:
    if isinstance(x, Tensor):
        return (tuple(x.shape), tuple(x.stride()), x.dtype)
    if isinstance(x, list | tuple):
        return tuple(_form(item) for item in x)
    return (type(x), x)


def _split_sizes(num_queries: int, num_keys: int) -> tuple[int, int]:
    """Rows of queries and keys that one thread handles at a time [cpu/FlashAttentionKernel.cpp]."""
    queries = 256 if num_queries >= 768 else 64 if num_queries >= 192 else 32
    return min(queries, num_queries), min(512, num_keys)


def _flash_forward(space: Workspace, args: Sequence[Any], kwargs: Any, result: Any) -> int:
    """Scores, maxima, sums and results of each thread's block [same file, cpu_flash_attention]."""
    query, key = args[0], args[1]
    rows, columns = _split_sizes(query.shape[-2], key.shape[-2])
    elements = rows * columns + 2 * rows + rows * query.shape[-1]
    reduced = rows * columns * query.element_size() if query.element_size() < 4 else 0
    return space.num_threads * (elements * max(4, query.element_size()) + reduced)


def _flash_backward(space: Workspace, args: Sequence[Any], kwargs: Any, result: Any) -> int:
    """Scores and their gradients [same file, cpu_flash_attention_backward]."""
    query, key = args[1], args[2]
    rows, columns = _split_sizes(query.shape[-2], key.shape[-2])
    reduced = 2 * rows * columns * query.element_size() if query.element_size() < 4 else 0
    wide = max(4, query.element_size())
    return space.num_threads * (2 * rows * columns * wide + reduced) + rows * wide


def _flash_backward_cuda(space: Workspace, args: Sequence[Any], kwargs: Any, result: Any) -> int:
    """A float32 gradient of the queries, row sums, and the gradients of each query head's keys.

    [transformers/cuda/flash_attn/flash_api.cpp, mha_bwd: dq_accum, softmax_d, dk_expanded,
    dv_expanded]. cuDNN does not publish what its kernel asks for; it is taken to be the same.
    """
    query, key = args[1], args[2]
    batch, heads, num_queries, size = query.shape
    rows = batch * heads * _rounded(num_queries, 128)
    is_shared = key.shape[1] != heads
    expanded = 2 * batch * heads * key.shape[2] * size * query.element_size() if is_shared else 0
    return 4 * rows * (_rounded(size, 32) + 1) + expanded


def _efficient_backward(space: Workspace, args: Sequence[Any], kwargs: Any, result: Any) -> int:
    """Row sums, and of narrow dtypes a float32 gradient of the queries.

    [transformers/cuda/attention_backward.cu, _efficient_attention_backward: delta, workspace].
    """
    query = args[1]
    batch, heads, num_queries, size = query.shape
    wide = _rounded(size, 32) if query.element_size() < 4 else 0
    return 4 * batch * heads * _rounded(num_queries, 64) * (wide + 1)


def _embedding_backward(space: Workspace, args: Sequence[Any], kwargs: Any, result: Any) -> int:
    """On a GPU indices are sorted, and rows of equal ones summed ten at a time.

    [cuda/Embedding.cu and EmbeddingBackwardKernel.cu: grad_weight_per_segment and six lists].
    """
    gradient, indices, num_weights = args[:3]
    count = indices.numel()
    if gradient.device.type == "cpu" or count <= 3072:
        return 0
    segments = min(count, num_weights)
    partial = count // 10 + segments
    lists = 3 * count + 2 * segments + partial
    return 4 * partial * gradient.shape[-1] + indices.element_size() * lists


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _linear_cross_entropy(
    space: Workspace, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> int:
    """The kernel goes over groups of rows; after the second nothing new is allocated."""
    hidden_MD, weight_VD, targets_M, *rest = args
    rows = slice(2 * max(1, GROUP_ELEMENTS // weight_VD.shape[0]))
    key = ("linear_cross_entropy", *map(_form, args), *((k, _form(x)) for k, x in kwargs.items()))
    if key not in space.known:
        few = (hidden_MD[rows], weight_VD, targets_M[rows], *rest)
        space.known[key] = space.python_kernel("plait::linear_cross_entropy", few, kwargs)
    return space.known[key]


_RULES: dict[str, Callable[[Workspace, Sequence[Any], Any, Any], int]] = {
    "plait.linear_cross_entropy": _linear_cross_entropy,
    "aten._scaled_dot_product_flash_attention_for_cpu": _flash_forward,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
    "aten._scaled_dot_product_flash_attention_backward": _flash_backward_cuda,
    "aten._scaled_dot_product_cudnn_attention_backward": _flash_backward_cuda,
    "aten._scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten.embedding_dense_backward": _embedding_backward,
}
