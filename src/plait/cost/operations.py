"""What one operator costs: arithmetic, bytes, and from these its time on a device.

Operands and results are known by their forms only: fake tensors, real ones, or `Value`s. Matrix
products and attention are priced by their arithmetic, everything else by the bytes that it reads
and writes, views not at all. Collectives are in `collectives.py`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

from plait.cost.clusters import Device
from plait.cost.collectives import collective_of
from plait.errors import GraphError
from plait.graph.graph import Value
from plait.graph.schedule import CALL, CONSTANT, GETITEM, ISLAND, OBJECT, PYTHON, resolve
from plait.ops.attention import causal_pairs
from plait.ops.muon import orthogonalize_flops


class Kind(Enum):
    """What bounds an operator."""

    MATRIX = "matrix"
    ATTENTION = "attention"
    MEMORY = "memory"
    FREE = "free"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an operator does, on any device.

    flops: a multiplication and an addition count two. sizes: rows, inner and columns of a product.
    bytes: read and written. pieces: parts that a kernel works through one by one, each of which
    costs it something however small it is; 0 where that is not known to matter.
    """

    kind: Kind
    bytes: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.float32
    sizes: tuple[int, int, int] | None = None
    pieces: int = 0


FREE = Cost(kind=Kind.FREE)


def cost_of(
    operator: str, args: Sequence[object], kwargs: Mapping[str, object], result: object
) -> Cost:
    """The cost of an operator named as in a schedule, from its operands and its result.

    args, kwargs and result hold forms (tensors or `Value`s), alone or in lists, and constants.
    Raises GraphError for a collective, and for a call of a template, which has steps of its own.
    """
    if operator in (GETITEM, CONSTANT) or operator.startswith(PYTHON):
        return FREE
    if operator.startswith(CALL) or collective_of(operator) is not None:
        raise GraphError(f"{operator} is no single computation: price its steps, or its message.")
    inputs, outputs = _forms((*args, *kwargs.values())), _forms(result)
    if operator.startswith((ISLAND, OBJECT)):
        return _memory(inputs, outputs)
    packet = operator.rpartition(".")[0]
    overload = cast("OpOverload", resolve(operator))
    named = _by_name(overload, args, kwargs)
    outputs = outputs or _written(overload, named)
    if packet in _FREE or overload.is_view or not outputs:
        return FREE
    if packet in _GATHERS:
        # Reads as much of its first operand as it yields, and all of the indices.
        return _memory([*outputs, *inputs[1:]], outputs)
    formula = _FORMULAS.get(packet)
    if formula is None and {"query", "key", "value"} <= named.keys():
        formula = _attention
    if formula is None and overload.overloadpacket in flop_registry:
        return _registered(overload, args, kwargs, inputs, outputs)
    if formula is None:
        return _memory(inputs, outputs)
    work = formula(packet, named)
    return Cost(
        kind=work.kind,
        bytes=sum(form.num_bytes for form in (*inputs, *outputs)),
        flops=work.flops,
        dtype=work.dtype,
        sizes=work.sizes,
        pieces=work.pieces,
    )


def has_formula(operator: str) -> bool:
    """Whether the arithmetic of an operator is known: here, or to torch.utils.flop_counter."""
    packet = operator.rpartition(".")[0]
    return packet in _FORMULAS or resolve(operator).overloadpacket in flop_registry  # type: ignore[attr-defined]


def operation_s(cost: Cost, device: Device) -> float:
    """Time of a cost on a device, in seconds, never less than a launch; nothing if it is free.

    A roofline [Williams et al. 2009]: the longer of arithmetic and bytes. The time of a product
    holds the reading of its operands already (`Device.matrix_efficiency_at`).
    """
    if cost.kind is Kind.FREE:
        return 0.0
    bytes_s = cost.bytes / device.memory_bandwidth_bytes_per_s
    if cost.kind is Kind.MEMORY:
        return max(device.launch_s, bytes_s)
    efficiency = device.attention_efficiency
    if cost.kind is Kind.MATRIX:
        efficiency = device.matrix_efficiency
        if cost.sizes is not None:
            efficiency = device.matrix_efficiency_at(*cost.sizes, dtype=cost.dtype)
    flops_s = cost.flops / (device.peak(cost.dtype) * efficiency)
    return max(device.launch_s, bytes_s, flops_s)


@dataclass(frozen=True)
class _Form:
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Work:
    kind: Kind
    flops: int
    dtype: torch.dtype
    sizes: tuple[int, int, int] | None = None
    pieces: int = 0


def _forms(value: object) -> list[_Form]:
    """Forms of the tensors in a value; one that is expanded has the bytes that it has in memory."""
    if isinstance(value, Value) and value.dtype is not None:
        return [_form(value.shape, value.stride, value.dtype)]
    if isinstance(value, Tensor):
        shape = tuple(int(size) for size in value.shape)
        stride = value.stride() if value.layout is torch.strided else (1,) * len(shape)
        return [_form(shape, stride, value.dtype)]
    if isinstance(value, Mapping):
        value = tuple(cast("Mapping[object, object]", value).values())
    if isinstance(value, (list, tuple)):
        items = cast("Sequence[object]", value)
        return [form for item in items for form in _forms(item)]
    return []


def _form(shape: tuple[int, ...], stride: Sequence[int], dtype: torch.dtype) -> _Form:
    held = math.prod(size for size, step in zip(shape, stride, strict=True) if step)
    return _Form(shape, dtype, held * dtype.itemsize)


def _memory(inputs: Sequence[_Form], outputs: Sequence[_Form]) -> Cost:
    return Cost(kind=Kind.MEMORY, bytes=sum(form.num_bytes for form in (*inputs, *outputs)))


def _written(overload: OpOverload, named: Mapping[str, object]) -> list[_Form]:
    """Forms of the operands that an operator changes: all that some of an optimizer's have."""
    arguments = cast("Any", overload)._schema.arguments
    changed = [each.name for each in arguments if each.alias_info and each.alias_info.is_write]
    return [form for name in changed for form in _forms(named.get(name))]


def _by_name(
    overload: OpOverload, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    schema = cast("Any", overload)._schema
    names = [argument.name for argument in schema.arguments]
    return {
        **{each.name: each.default_value for each in schema.arguments if each.has_default_value()},
        **dict(zip(names, args, strict=False)),
        **kwargs,
    }


def _named(named: Mapping[str, object], *names: str) -> list[_Form]:
    return [_forms(named[name])[0] for name in names]


def _product(packet: str, named: Mapping[str, object]) -> _Work:
    first, second = {
        "aten.addmm": ("mat1", "mat2"),
        "aten.baddbmm": ("batch1", "batch2"),
        "aten.dot": ("self", "tensor"),
        "aten.mv": ("self", "vec"),
        "plait.strict_linear": ("x_MK", "weight_NK"),
    }.get(packet, ("self", "mat2"))
    left, right = _named(named, first, second)
    *batch, rows, inner = (1, *left.shape) if len(left.shape) == 1 else left.shape
    columns = math.prod(right.shape) // math.prod((*batch, inner))
    return _Work(
        kind=Kind.MATRIX,
        flops=2 * math.prod(batch) * rows * inner * columns,
        dtype=left.dtype,
        sizes=(rows, inner, columns),
    )


def _attention(packet: str, named: Mapping[str, object]) -> _Work:
    """Two products forward; backward five [Dao 2023, arXiv 2307.08691, section 4.1: 2.5 times].

    Causal attention needs the pairs of each query with itself and what came before.
    """
    names = ("query", "key", "value")
    if packet.startswith("plait."):
        names = tuple(each for each in named if each[:2] in ("q_", "k_", "v_"))
    query, key, value = _named(named, *names)
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    if packet.startswith(("aten._flash", "aten._efficient")):
        num_queries, num_keys = query.shape[-3], key.shape[-3]  # heads after tokens there
    pairs = num_queries * num_keys
    is_causal = bool(named.get("is_causal") or named.get("causal"))
    if packet.startswith("plait."):
        pairs = causal_pairs(num_queries, num_keys, cast("int | None", named.get("window")))
    elif is_causal:
        seen = min(num_queries, num_keys)
        pairs = causal_pairs(seen, seen) + (num_queries - seen) * num_keys
    heads = math.prod(query.shape[:-1]) // num_queries
    forward = 2 * heads * pairs * (query.shape[-1] + value.shape[-1])
    is_blocked = packet.startswith("aten._scaled_dot_product_flash_attention_for_cpu")
    return _Work(
        kind=Kind.ATTENTION,
        flops=forward * 5 // 2 if packet.endswith("backward") else forward,
        dtype=query.dtype,
        pieces=heads * _flash_blocks(num_queries, num_keys, is_causal) if is_blocked else 0,
    )


def _flash_blocks(num_queries: int, num_keys: int, is_causal: bool) -> int:
    """Blocks of queries and keys of one head in PyTorch's kernels for CPUs.

    [PyTorch, aten/src/ATen/native/cpu/FlashAttentionKernel.cpp: 256, 64 or 32 queries, from 768,
    from 192 or fewer, with 512 keys; a block of keys that no query of it sees is left out.] Each
    calls small products, and for bfloat16 these cost more to call than to do.
    """
    rows = 256 if num_queries >= 768 else 64 if num_queries >= 192 else 32
    return sum(
        math.ceil((min(first + rows, num_keys) if is_causal else num_keys) / 512)
        for first in range(0, num_queries, rows)
    )


def _grouped_linear(packet: str, named: Mapping[str, object]) -> _Work:
    """Each row is multiplied once, by the matrix of its group, however rows are routed."""
    x, weight = _named(named, "x_RI", "weight_GOI")
    (rows, inner), (groups, columns, _) = x.shape, weight.shape
    return _Work(
        kind=Kind.MATRIX,
        flops=2 * rows * inner * columns * (2 if packet.endswith("backward") else 1),
        dtype=x.dtype,
        sizes=(max(rows // groups, 1), inner, columns),  # of one product, at balanced routing
    )


def _grouped_mm(packet: str, named: Mapping[str, object]) -> _Work:
    """A product for each group of rows, of columns, or of what is summed over; none knows which.

    Forms of aten._grouped_mm: 2D by 3D, 3D by 2D, 2D by 2D (a group owns a part of the inner dim)
    and 3D by 3D. All rows count once, however they are routed; sizes are those at balanced routing.
    """
    if packet.startswith("transformers."):
        first, second = ("input", "weight")
    else:
        first, second = ("self", "mat2")
    left, right = _named(named, first, second)
    groups = max((each.shape[0] for each in (left, right) if len(each.shape) == 3), default=1)
    rows, inner, columns = left.shape[-2], left.shape[-1], right.shape[-1]
    flops = 2 * math.prod(left.shape) * columns
    if len(left.shape) == 3 and len(right.shape) == 2:
        flops, columns = flops // groups, max(columns // groups, 1)
    elif len(left.shape) == 2 and len(right.shape) == 3:
        rows = max(rows // groups, 1)
    return _Work(
        kind=Kind.MATRIX,
        flops=flops * (2 if packet.endswith("backward") else 1),
        dtype=left.dtype,
        sizes=(rows, inner, columns),
    )


def _orthogonalize(packet: str, named: Mapping[str, object]) -> _Work:
    """Muon's products, without sizes: they have several."""
    (x,) = _named(named, "x")
    dtype = cast("torch.dtype", named["dtype"])
    return _Work(kind=Kind.MATRIX, flops=orthogonalize_flops(*x.shape), dtype=dtype)


def _linear_cross_entropy(packet: str, named: Mapping[str, object]) -> _Work:
    """The logits and, with gradients, those of the hidden states and of the weight."""
    hidden, weight = _named(named, "hidden_MD", "weight_VD")
    (rows, inner), columns = hidden.shape, weight.shape[0]
    products = 1
    if named["with_gradients"]:
        # Of one group of rows, the weight's is a product of its own in the backward.
        is_whole = packet == "plait.linear_cross_entropy" and named.get("with_weight", True)
        products += 2 if is_whole else 1
    return _Work(
        kind=Kind.MATRIX,
        flops=2 * rows * inner * columns * products,
        dtype=cast("torch.dtype", named["dtype"]),
        sizes=(rows, inner, columns),
    )


def _registered(
    overload: OpOverload,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    inputs: Sequence[_Form],
    outputs: Sequence[_Form],
) -> Cost:
    """By the formula that PyTorch has for it (torch.utils.flop_counter), without sizes."""
    count = cast("Callable[..., int]", flop_registry[overload.overloadpacket])
    shapes = [torch.Size(form.shape) for form in outputs]
    flops = count(
        *(_shaped(x) for x in args),
        **{name: _shaped(x) for name, x in kwargs.items()},
        out_val=shapes[0] if len(shapes) == 1 else shapes,
    )
    return Cost(
        kind=Kind.MATRIX,
        bytes=sum(form.num_bytes for form in (*inputs, *outputs)),
        flops=int(flops),
        dtype=inputs[0].dtype,
    )


def _shaped(x: object) -> object:
    return torch.Size(_forms(x)[0].shape) if isinstance(x, (Tensor, Value)) else x


_FORMULAS: dict[str, Callable[[str, Mapping[str, object]], _Work]] = {
    "aten.mm": _product,
    "aten.addmm": _product,
    "aten.bmm": _product,
    "aten.baddbmm": _product,
    "aten.dot": _product,
    "aten.mv": _product,
    "plait.strict_linear": _product,
    "plait.blocked_causal_attention": _attention,
    "plait.blocked_causal_attention_backward": _attention,
    "plait.causal_part_attention": _attention,
    "plait.causal_part_attention_backward": _attention,
    "plait.latent_causal_attention": _attention,
    "plait.latent_causal_attention_backward": _attention,
    "plait.strict_causal_attention": _attention,
    "plait.strict_causal_attention_backward": _attention,
    "plait.flash_backward": _attention,
    "plait.grouped_linear": _grouped_linear,
    "plait.grouped_linear_backward": _grouped_linear,
    "plait.linear_cross_entropy": _linear_cross_entropy,
    "plait.linear_cross_entropy_rows": _linear_cross_entropy,
    "aten._grouped_mm": _grouped_mm,
    "transformers.grouped_mm_fallback": _grouped_mm,
    "transformers.grouped_mm_fallback_backward": _grouped_mm,
    "plait.orthogonalize": _orthogonalize,
}
_GATHERS = frozenset(
    f"aten.{name}" for name in ("embedding", "gather", "index", "index_select", "_unsafe_index")
)
_FREE = frozenset(
    (
        *(f"aten.{name}" for name in ("_unsafe_view", "detach", "alias", "lift_fresh_copy")),
        *(f"aten.{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty")),
        *(f"aten.{name}" for name in ("new_empty_strided", "empty_permuted", "sym_size")),
        *(f"{space}.wait_tensor" for space in ("_c10d_functional", "c10d_functional")),
    )
)
"""Views that are not marked as such, memory without values, and waiting, which is communication."""
