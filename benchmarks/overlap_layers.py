"""A stack of Llama layers on paper: the operations of one tensor-parallel rank, with their times.

With sequence parallel a layer sends four messages forward and four backward, each for every
replica. Stages, forward: q, k, v | attention | output | scatter, norm, gather | gate, up, down |
scatter, norm, gather. Attention is a barrier, or causally split: then part j waits for parts 0..j.
The products of the MLP, whose weights are the largest, may take several replicas' tokens at once.
Backward goes the same way back; gradients of weights are whole, wait for all replicas, and are
filler. Rotations, residuals and biases are left out: they are small and local.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol

import torch

from plait.cost.clusters import Device, Link
from plait.cost.collectives import Collective, collective_s
from plait.cost.operations import Cost, Kind, operation_s
from plait.cost.simulate import COMPUTE, FILLER, Operation, Priority, communication

_TP = communication("tp")
_BFLOAT16_BYTES = 2
_NORM_PASSES = (
    6  # over the tokens of one rank: the sum of the residual and the norm, read and written
)
_BACKWARD_ATTENTION = 2.5  # Dao 2023, arXiv 2307.08691, section 4.1
LAYER = 10.0
"""Distance of the positions of two layers; stages lie between."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model as one rank of `tp` sees it. key_width: of all key heads together."""

    name: str
    width: int
    inner_width: int
    key_width: int
    num_layers: int
    num_tokens: int = 8192
    tp: int = 8


# Dubey et al. 2024, arXiv 2407.21783, table 3.
LLAMA_70B = Shape(name="Llama 70B", width=8192, inner_width=28672, key_width=1024, num_layers=80)
LLAMA_405B = Shape(
    name="Llama 405B", width=16384, inner_width=53248, key_width=1024, num_layers=126
)


@dataclass(frozen=True)
class Split:
    """Tokens of each replica. joined: how many replicas each product of the MLP takes, in order."""

    sizes: tuple[int, ...]
    joined: tuple[int, ...] = ()
    is_causal: bool = False

    def groups(self) -> list[range]:
        """Replicas of each product of the MLP."""
        ends = list(accumulate(self.joined or (1,) * len(self.sizes)))
        assert ends[-1] == len(self.sizes)
        return [range(start, end) for start, end in pairwise((0, *ends))]

    def pairs(self, j: int) -> float:
        """Pairs of the queries of part j with the keys up to themselves."""
        return self.sizes[j] * (sum(self.sizes[:j]) + self.sizes[j] / 2)

    def __str__(self) -> str:
        """As in "4 x 2048, MLP 1+2+1"."""
        parts = "+".join(str(size) for size in self.sizes)
        if len(set(self.sizes)) == 1 and len(self.sizes) > 1:
            parts = f"{len(self.sizes)} x {self.sizes[0]}"
        return parts + (f", MLP {'+'.join(map(str, self.joined))}" if self.joined else "")


class Times(Protocol):
    """What operations of one rank take, in seconds."""

    def product_s(self, rows: int, inner: int, columns: int) -> float:
        """A matrix (rows, inner) times one (inner, columns)."""
        ...

    def attention_s(self, pairs: float) -> float:
        """Forward, over so many pairs of query and key, all heads of the rank."""
        ...

    def moved_s(self, num_elements: float) -> float:
        """Read or written in memory."""
        ...

    def message_s(self, num_elements: float) -> float:
        """Gathered or scattered, so many on the larger side."""
        ...


@dataclass(frozen=True)
class PaperTimes:
    """Times by the cost model, `plait.cost`."""

    shape: Shape
    device: Device
    link: Link

    def product_s(self, rows: int, inner: int, columns: int) -> float:
        """By arithmetic, with the efficiency of these sizes."""
        flops = 2 * rows * inner * columns
        sizes = (rows, inner, columns)
        cost = Cost(kind=Kind.MATRIX, flops=flops, dtype=torch.bfloat16, sizes=sizes)
        return operation_s(cost, self.device)

    def attention_s(self, pairs: float) -> float:
        """By arithmetic: two products of the head size, for each pair."""
        flops = round(4 * pairs * self.shape.width / self.shape.tp)
        return operation_s(
            Cost(kind=Kind.ATTENTION, flops=flops, dtype=torch.bfloat16), self.device
        )

    def moved_s(self, num_elements: float) -> float:
        """By bytes."""
        num_bytes = round(_BFLOAT16_BYTES * num_elements)
        return operation_s(Cost(kind=Kind.MEMORY, bytes=num_bytes), self.device)

    def message_s(self, num_elements: float) -> float:
        """As a ring among the ranks of tp."""
        num_bytes = _BFLOAT16_BYTES * num_elements
        return collective_s(Collective.ALL_GATHER, num_bytes, self.shape.tp, self.link)


@dataclass
class Program:
    """Operations with their place: the position in the model, and the replica."""

    operations: list[Operation] = field(default_factory=list)
    positions: list[float | None] = field(default_factory=list)  # None: filler
    replicas: list[int] = field(default_factory=list)
    indices: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        name: str,
        duration_s: float,
        needs: Sequence[str],
        position: float | None,
        replica: int = 0,
        *,
        stream: str = COMPUTE,
        pinned_bytes: int = 0,
    ) -> str:
        """Append an operation; what it needs is named, and ignored if it is not there."""
        before = tuple(self.indices[need] for need in needs if need in self.indices)
        self.indices[name] = len(self.operations)
        self.operations.append(Operation(name, stream, duration_s, before, pinned_bytes))
        self.positions.append(position)
        self.replicas.append(replica)
        return name

    def send(self, name: str, duration_s: float, need: str, position: float, replica: int) -> str:
        """Append a message."""
        return self.add(name, duration_s, [need], position, replica, stream=_TP)

    def priorities(self, skew: float) -> list[Priority]:
        """Position, a later replica by `skew` later; filler last."""
        return [
            FILLER if position is None else (position + skew * replica, replica)
            for position, replica in zip(self.positions, self.replicas, strict=True)
        ]


@dataclass(frozen=True)
class _Layer:
    """Sizes of one layer on one rank, and the times that several stages share."""

    shape: Shape
    times: Times

    @property
    def inner(self) -> int:
        return self.shape.inner_width // self.shape.tp

    @property
    def share(self) -> int:
        return self.shape.width // self.shape.tp

    @property
    def key_share(self) -> int:
        return 2 * self.shape.key_width // self.shape.tp

    def norm_s(self, tokens: int) -> float:
        return self.times.moved_s(_NORM_PASSES * tokens * self.share)

    def message_s(self, tokens: int) -> float:
        return self.times.message_s(tokens * self.shape.width)

    def gate_s(self, tokens: int) -> float:
        """The product of gate and up's values, in place: two read, one written."""
        return self.times.moved_s(3 * tokens * self.inner)


def forward(shape: Shape, times: Times, split: Split) -> Program:
    """The forward of all layers."""
    program, of, sizes = Program(), _Layer(shape, times), split.sizes
    width, inner = shape.width, of.inner
    for layer in range(shape.num_layers):
        at = LAYER * layer
        for j, t in enumerate(sizes):
            qkv_s = times.product_s(t, width, of.share + of.key_share)
            program.add(f"qkv.{layer}.{j}", qkv_s, [f"in.{layer}.{j}"], at, j)
        attended = _attention(program, times, split, layer)
        for j, t in enumerate(sizes):
            output_s = times.product_s(t, of.share, width)
            x = program.add(f"o.{layer}.{j}", output_s, [attended[j]], at + 2, j)
            x = program.send(f"scatter.{layer}.{j}", of.message_s(t), x, at + 2, j)
            x = program.add(f"norm.{layer}.{j}", of.norm_s(t), [x], at + 2.5, j)
            program.send(f"gather.{layer}.{j}", of.message_s(t), x, at + 3, j)
        for group in split.groups():
            t, j = sum(sizes[i] for i in group), group[-1]
            needs = [f"gather.{layer}.{i}" for i in group]
            gate_up_s = times.product_s(t, width, 2 * inner) + of.gate_s(t)
            x = program.add(f"gate_up.{layer}.{j}", gate_up_s, needs, at + 4, j)
            x = program.add(f"down.{layer}.{j}", times.product_s(t, inner, width), [x], at + 4.1, j)
            for i in group:
                y = program.send(f"scatter_2.{layer}.{i}", of.message_s(sizes[i]), x, at + 5, i)
                y = program.add(f"norm_2.{layer}.{i}", of.norm_s(sizes[i]), [y], at + 4.05, i)
                program.send(f"in.{layer + 1}.{i}", of.message_s(sizes[i]), y, at + 6, i)
    return program


def _attention(program: Program, times: Times, split: Split, layer: int) -> list[str]:
    """Append the attention of a layer; returns what each replica's output waits for."""
    replicas = range(len(split.sizes))
    parts = [f"qkv.{layer}.{j}" for j in replicas]
    at = LAYER * layer + 1
    if not split.is_causal:
        duration_s = times.attention_s(sum(split.sizes) ** 2 / 2)
        return [program.add(f"attend.{layer}", duration_s, parts, at)] * len(parts)
    return [
        program.add(f"attend.{layer}.{j}", times.attention_s(split.pairs(j)), parts[: j + 1], at, j)
        for j in replicas
    ]


def backward(shape: Shape, times: Times, split: Split) -> Program:
    """The backward of all layers; position 0 is the last layer."""
    program, of, sizes = Program(), _Layer(shape, times), split.sizes
    width, inner = shape.width, of.inner
    for layer in range(shape.num_layers):
        at = LAYER * layer
        for j, t in enumerate(sizes):
            need = f"in.{layer}.{j}"
            program.send(f"gather_2.{layer}.{j}", of.message_s(t), need, at, j)
        for group in split.groups():
            t, j = sum(sizes[i] for i in group), group[-1]
            needs = [f"gather_2.{layer}.{i}" for i in group]
            down_s = times.product_s(t, width, inner)
            x = program.add(f"down.{layer}.{j}", down_s, needs, at + 1, j)
            gate_up_s = times.product_s(t, 2 * inner, width) + of.gate_s(t)
            x = program.add(f"gate_up.{layer}.{j}", gate_up_s, [x], at + 1.1, j)
            for i in group:
                y = program.send(f"scatter.{layer}.{i}", of.message_s(sizes[i]), x, at + 2, i)
                y = program.add(f"norm.{layer}.{i}", 2 * of.norm_s(sizes[i]), [y], at + 1.5, i)
                y = program.send(f"gather.{layer}.{i}", of.message_s(sizes[i]), y, at + 3, i)
                output_s = times.product_s(sizes[i], width, of.share)
                program.add(f"o.{layer}.{i}", output_s, [y], at + 4, i)
        attended = _attention_backward(program, times, split, layer)
        for j, t in enumerate(sizes):
            qkv_s = times.product_s(t, of.share + of.key_share, width)
            x = program.add(f"qkv.{layer}.{j}", qkv_s, attended[j], at + 6, j)
            x = program.send(f"scatter_2.{layer}.{j}", of.message_s(t), x, at + 7, j)
            program.add(f"in.{layer + 1}.{j}", 2 * of.norm_s(t), [x], at + 6.5, j)
        _weight_gradients(program, of, split, layer)
    return program


def _attention_backward(
    program: Program, times: Times, split: Split, layer: int
) -> list[list[str]]:
    """Append attention's backward; returns what each replica's q, k and v wait for."""
    replicas = range(len(split.sizes))
    parts = [f"o.{layer}.{j}" for j in replicas]
    at = LAYER * layer + 5
    if not split.is_causal:
        duration_s = times.attention_s(_BACKWARD_ATTENTION * sum(split.sizes) ** 2 / 2)
        return [[program.add(f"attend.{layer}", duration_s, parts, at)]] * len(parts)
    # The gradient of keys 0..j comes from the queries of j and all later parts.
    names = [
        program.add(
            f"attend.{layer}.{j}",
            times.attention_s(_BACKWARD_ATTENTION * split.pairs(j)),
            [parts[j]],
            at,
            j,
        )
        for j in replicas
    ]
    return [names[j:] for j in replicas]


def _weight_gradients(program: Program, of: _Layer, split: Split, layer: int) -> None:
    """Append one product over all tokens for each weight; until it runs it keeps both operands."""
    replicas = range(len(split.sizes))
    mlp = [group[-1] for group in split.groups()]
    tokens = sum(split.sizes)
    for name, after, parts, rows, columns in (
        ("down", "gather_2", replicas, of.shape.width, of.inner),
        ("gate", "down", mlp, of.inner, of.shape.width),
        ("up", "down", mlp, of.inner, of.shape.width),
        ("o", "gather", replicas, of.shape.width, of.share),
        ("q", "qkv", replicas, of.share, of.shape.width),
        ("kv", "qkv", replicas, of.key_share, of.shape.width),
    ):
        program.add(
            f"weight.{name}.{layer}",
            of.times.product_s(rows, tokens, columns),
            [f"{after}.{layer}.{j}" for j in parts],
            None,
            pinned_bytes=_BFLOAT16_BYTES * tokens * (rows + columns),
        )
