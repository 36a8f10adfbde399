"""Rules of token independence tried out: an operator on all of a few tokens, and on parts.

A rule says that the parts of a result, put together, are the result of the whole. Here that is
computed, once for each distinct operator with its shapes, dims and constants, on random numbers and
few tokens. A rule that does not hold is a mistake of ours, and stops the compilation.
"""

# pyright: basic
# (fx nodes are not typed.)

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from plait.compiler.replicate_joint import SIZED, Parts
from plait.compiler.token_moves import Tokens
from plait.compiler.token_rules import part_dim, takes_whole
from plait.compiler.tokens import Certificate
from plait.errors import GraphError
from plait.graph.collectives import is_collective, is_wait
from plait.graph.graph import Node
from plait.graph.random_nodes import is_random
from plait.ops.numerics import bfloat16_pays

MAX_ELEMENTS = 1 << 22
"""Operators with a larger operand are not tried."""
_FEW = 6
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float32: 1e-3}
_aten = torch.ops.aten
_map_nodes: Any = fx.map_arg


@dataclass
class Trials:
    """What was tried in a graph: the same operator is tried once for all of its pieces."""

    done: dict[object, str] = field(default_factory=dict)
    pool: Tensor | None = None

    def numbers(self, count: int) -> Tensor:
        """Random numbers, drawn once, and not from the program's stream."""
        if self.pool is None or self.pool.numel() < count:
            generator = torch.Generator().manual_seed(0)
            self.pool = torch.randn(max(count, 1 << 16), generator=generator)
        return self.pool[:count]


def refute(certificate: Certificate, trials: Trials) -> None:
    """Try every operator of the region; the certificate says how many, and which not and why.

    Raises GraphError for one whose parts are not the whole.
    """
    found: set[object] = set()
    with _disable_current_modes(), torch.no_grad():
        for node in certificate.region:
            if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
                continue
            trial = _Trial(node, certificate, trials)
            key = trial.key()
            if key not in trials.done:
                trials.done[key] = trial.run()
            found.add(key)
    outcomes = Counter(trials.done[key] for key in found)
    certificate.num_tried = outcomes.pop("", 0)
    certificate.not_tried = dict(outcomes)


class _Trial:
    def __init__(self, node: Node, certificate: Certificate, trials: Trials) -> None:
        self.node, self.trials = node, trials
        self.tokens, self.certificate = certificate.tokens, certificate
        labels = [self.tokens.get(x) for x in (node, *node.all_input_nodes)]
        flat = [x for each in labels for x in (each if isinstance(each, tuple) else (each,))]
        self.labels = [x for x in flat if isinstance(x, Tokens)]
        total = max(x.total for x in self.labels)
        share = max(max(x.total // x.length for x in self.labels), 1)
        few = _FEW * share
        if few < total:
            self.parts = Parts((few // 3, few - few // 3))
        else:
            half = total // 2 // share * share
            self.parts = Parts((half, total - half) if half else (total,))
        self.total = total

    def key(self) -> object:
        """What makes it the same trial as another."""
        described = _map_nodes((self.node.args, self.node.kwargs), self._described)
        value = self.node.meta["val"]
        shape = tuple(value.shape) if isinstance(value, Tensor) else len(value)
        return repr((str(self.node.target), described, shape, self.tokens[self.node]))

    def _described(self, node: Node) -> Any:
        value = node.meta["val"]
        where = self._dim_of(node)
        shape = tuple(value.shape) if isinstance(value, Tensor) else len(value)
        return f"{shape} {getattr(value, 'dtype', '')} {where}"

    def _dim_of(self, operand: Node) -> tuple[int | None, bool]:
        """The dim of an operand's tokens, if it is parted or whole, and whether it is parted."""
        given = self.tokens.get(operand)
        if takes_whole(self.node, operand, self.tokens):
            return None, False
        if operand in self.certificate.drawn:
            return self.certificate.drawn[operand].tokens.dim, True
        if operand in self.certificate.region:
            return (given.dim if isinstance(given, Tokens) else None), True
        dim = part_dim(self.node, operand, self.tokens)
        return dim, dim is not None

    def run(self) -> str:
        """Try it. Returns why it was not tried, or ""."""
        node = self.node
        if is_collective(node) or is_wait(node) or node.target is torch.ops.plait.own_part.default:
            return "communication"
        if len(self.parts.sizes) < 2 or not all(x.is_row for x in self.labels):
            return "tokens of several ranks side by side"
        if is_random(node):
            return "it draws random numbers"
        made = {x: self._operand(x) for x in node.all_input_nodes}
        operands = {node: x for node, x in made.items() if x is not None}
        if len(operands) < len(made):
            return "its operands are large"
        try:
            whole = self._call(lambda x: operands[x], None)
        except NotImplementedError:
            return "it has no kernel on the CPU"
        except (RuntimeError, IndexError):
            return "it does not take so few tokens, or random numbers"
        count = range(len(self.parts.sizes))
        if node in self.certificate.causal:
            parts = self._attentions(operands)
        else:
            parts = [self._call(self._part(operands, i), i) for i in count]
        self._compare(whole, parts)
        return ""

    def _scaled(self, length: int) -> int:
        return length * self.parts.total // self.total

    def _operand(self, node: Node) -> Tensor | None:
        value = node.meta["val"]
        dim, _ = self._dim_of(node)
        shape = list(value.shape)
        if dim is not None:
            shape[dim] = self._scaled(shape[dim])
        count = math.prod(shape)
        if count > MAX_ELEMENTS:
            return None
        numbers = self.trials.numbers(count).view(shape)
        if value.dtype.is_floating_point:
            return numbers.to(_dtype_of_trials(value.dtype))
        return (numbers > 0).to(value.dtype)

    def _part(self, operands: dict[Node, Tensor], i: int) -> Callable[[Node], Tensor]:
        def part(node: Node) -> Tensor:
            dim, is_parted = self._dim_of(node)
            x = operands[node]
            if dim is None or not is_parted:
                return x
            start, stop = self.parts.bounds(x.shape[dim])[i]
            return x.narrow(dim, start, stop - start)

        return part

    def _attentions(self, operands: dict[Node, Tensor]) -> list[Any]:
        """Attention by parts of the queries; of the gradients of keys, what all parts add."""
        causal = self.certificate.causal[self.node]
        dim = self.labels[0].dim  # of all operands and results
        parts: list[Any] = []
        for i in range(len(self.parts.sizes)):
            args = []
            for at, x in enumerate(causal.args):
                if at in causal.keys:
                    stop = self.parts.bounds(operands[x].shape[dim])[i][1]
                    args.append(operands[x].narrow(dim, 0, stop))
                else:
                    args.append(self._part(operands, i)(x) if isinstance(x, fx.Node) else x)
            made = causal.target(*args)
            parts.append(list(made) if causal.key_results else made)
        for result in causal.key_results:
            made = [part[result] for part in parts]
            for i, (start, stop) in enumerate(self.parts.bounds(made[-1].shape[dim])):
                seen = [x.narrow(dim, start, stop - start) for x in made[i:]]
                parts[i][result] = torch.stack(seen).sum(0)
        return parts

    def _call(self, operand: Callable[[Node], Tensor], part: int | None) -> Any:
        node, tokens = self.node, self.tokens[self.node]
        args, kwargs = _map_nodes((node.args, node.kwargs), operand)
        kwargs = {k: torch.device("cpu") if k == "device" else x for k, x in kwargs.items()}
        at = 1 if node.target in SIZED or node.target is _aten.slice_backward.default else None
        target = node.target
        if at is not None:
            assert isinstance(tokens, Tokens)
            is_view = node.target in SIZED
            shape = list(node.meta["val"].shape) if is_view else list(args[1])
            length = self._scaled(shape[tokens.dim])
            start, stop = (0, length) if part is None else self.parts.bounds(length)[part]
            shape[tokens.dim] = stop - start
            args = (args[0], shape, *args[2:]) if not is_view else (args[0], shape)
            if is_view and node.target is not _aten.expand.default:
                target = _aten.reshape.default
        return target(*args, **kwargs)

    def _compare(self, whole: Any, parts: list[Any]) -> None:
        labels = self.tokens[self.node]
        if isinstance(whole, Tensor):
            whole, parts, labels = (whole,), [(part,) for part in parts], (labels,)
        assert isinstance(labels, tuple)
        for i, label in enumerate(labels):
            if not isinstance(label, Tokens):
                continue
            together = torch.cat([part[i] for part in parts], label.dim)
            if not _is_equal(together, whole[i]):
                raise GraphError(
                    f"the rule of {self.node.target} is wrong: computed on parts of dim "
                    f"{label.dim}, the tokens, {self.node.format_node()} is not the whole. This is "
                    "a mistake of Plait, please report it. Use replicas=1 until it is corrected."
                )


@cache
def _dtype_of_trials(dtype: torch.dtype) -> torch.dtype:
    """What a rule is tried in, which does not depend on it: nothing that the CPU emulates.

    Attention over 4,096 tokens takes minutes so, and seconds in float32.
    """
    is_emulated = dtype is torch.bfloat16 and not bfloat16_pays("cpu")
    return torch.float32 if is_emulated else dtype


def _is_equal(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if torch.equal(found, expected):
        return True
    if not expected.dtype.is_floating_point:
        return False
    tolerance = _TOLERANCE.get(expected.dtype, 1e-6)
    found, expected = found.double(), expected.double()
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 1.0
    return torch.allclose(found, expected, rtol=0.0, atol=tolerance * scale, equal_nan=True)
