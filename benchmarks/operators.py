"""What O1 makes of the operators of a decoder, beside eager and TorchInductor, at training sizes.

Each operator is written as models write it. Forward and backward are timed together, the sides in
turn; "bytes over the bound" is what memory would have to move at the machine's copying speed in the
time taken, over the bytes that must be moved at least (each operand, result and gradient once).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import plait
from benchmarks.result import Row, run_benchmark
from plait.executor.run import Runnable
from plait.graph.graph import Role
from plait.ops.linear_cross_entropy import linear_cross_entropy

# Shapes: M rows (tokens), D model width, F inner width, H heads, K head size, V vocabulary.
M, D, F, H, K, V = 2048, 1024, 2816, 16, 64, 32_000
ROUNDS = 30
WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class Operator:
    """A function of tensors with gradients, and where its targets are met."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.bfloat16


def rms_norm_with_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sum, and the sum normalized."""
    total = x + residual
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return weight * normed.to(x.dtype), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalize by mean and variance."""
    return torch.nn.functional.layer_norm(x, (D,), weight, bias)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of the two halves of a head."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate the second by the SiLU of the first."""
    return torch.nn.functional.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """Gate the second by the GELU of the first."""
    return torch.nn.functional.gelu(gate) * up


OPERATORS = (
    Operator("RMSNorm with residual", rms_norm_with_residual, ((M, D), (M, D), (D,))),
    Operator("LayerNorm", layer_norm, ((M, D), (D,), (D,))),
    Operator("rotary embedding", rotary, ((1, H, M, K), (1, 1, M, K), (1, 1, M, K))),
    Operator("SwiGLU", swiglu, ((M, F), (M, F))),
    Operator("GeGLU", geglu, ((M, F), (M, F))),
)


def measure(quick: bool) -> list[Row]:
    """Time the operators that O1 fuses, the loss, and the optimizer's step."""
    rounds = 5 if quick else ROUNDS
    copy_s = _copy_s_per_byte()
    rows = [row for each in OPERATORS for row in _operator_rows(each, rounds, copy_s)]
    if quick:
        names = ("loss without logits", "AdamW step")
        claims = [
            Row(claim=name, unit="x", target=1.0, better="lower", full_only=True) for name in names
        ]
        return [*rows, *claims]
    return [*rows, *_loss_rows(rounds), *_optimizer_rows(rounds)]


def _operator_rows(operator: Operator, rounds: int, copy_s: float) -> list[Row]:
    torch.manual_seed(0)
    operands = [torch.randn(shape).to(operator.dtype) for shape in operator.shapes]
    for x in operands:
        x.requires_grad_()
    results = _tuple(operator.function(*operands))
    tangents = [torch.randn_like(x) for x in results]
    torch._dynamo.reset()
    sides = {
        "O1": plait.jit(operator.function, level="O1", cache=False),
        "eager": operator.function,
        "Inductor": torch.compile(operator.function),
    }

    def step(function: Callable) -> Callable[[], object]:
        return lambda: torch.autograd.grad(_tuple(function(*operands)), operands, tangents)

    times = _in_turn({name: step(function) for name, function in sides.items()}, rounds)
    # Forward reads operands and writes results; backward reads both tangents and operands, and
    # writes gradients.
    bound = sum(3 * _bytes(x) for x in operands) + sum(2 * _bytes(x) for x in results)
    moved = [s / copy_s / bound for s in times["O1"]]
    return [*_rows(operator.name, times), _row(f"{operator.name}: bytes over the bound", moved)]


def _loss_rows(rounds: int) -> list[Row]:
    """Our operator against the same loss from whole logits."""
    torch.manual_seed(0)
    hidden = torch.randn(M, D).bfloat16().requires_grad_()
    weight = (0.02 * torch.randn(V, D)).bfloat16().requires_grad_()
    targets = torch.randint(0, V, (M,))

    def plain() -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight).float()
        return torch.nn.functional.cross_entropy(logits, targets)

    torch._dynamo.reset()
    sides = {
        "O1": lambda: linear_cross_entropy(hidden, weight, targets) / M,
        "eager": plain,
        "Inductor": torch.compile(plain),
    }
    steps = {
        name: lambda f=f: torch.autograd.grad(f(), (hidden, weight)) for name, f in sides.items()
    }
    return _rows("loss without logits", _in_turn(steps, rounds))


def _optimizer_rows(rounds: int) -> list[Row]:
    """The program `optimizer` against AdamW as it comes, and under torch.compile."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(D, D) for _ in range(12)))
    x = torch.randn(8, D)
    graph = plait.capture(model, x, loss=lambda model, x: model(x).square().mean())
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-5)
    schedule = plait.compile(graph, level="O1", optimizer=optimizer)
    model(x).square().mean().backward()
    optimizer.step()
    runner = Runnable(schedule).optimizer
    given: dict[tuple[Role, str], object] = {(Role.STATE, "group 0/lr"): 1e-5}
    for name, p in model.named_parameters():
        given |= {(Role.PARAMETER, name): p, (Role.GRADIENT, name): p.grad}
        given |= {(Role.STATE, f"{name}/{key}"): s for key, s in optimizer.state[p].items()}
    torch._dynamo.reset()

    @torch.no_grad()
    def ours() -> object:
        return runner([given[value.role, value.name] for value in schedule.optimizer_inputs])

    sides = {"O1": ours, "eager": optimizer.step, "Inductor": torch.compile(optimizer.step)}
    return _rows("AdamW step", _in_turn(sides, rounds))


def _in_turn(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for i in range(WARM_UP_ROUNDS + rounds):
        for name in names[i % 3 :] + names[: i % 3]:
            start_s = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start_s)
    return {name: seconds[WARM_UP_ROUNDS:] for name, seconds in times.items()}


def _rows(name: str, times: dict[str, list[float]]) -> list[Row]:
    rows = []
    for rival in ("eager", "Inductor"):
        ratios = [ours / other for ours, other in zip(times["O1"], times[rival], strict=True)]
        claim = f"{name}, forward and backward: O1 / {rival}"
        rows.append(Row(claim=claim, unit="x", target=1.0, better="lower", samples=ratios))
    return rows


def _row(claim: str, samples: list[float]) -> Row:
    return Row(claim=claim, unit="x", target=None, better="lower", samples=samples)


def _copy_s_per_byte() -> float:
    """Seconds that a byte read or written takes in a large copy."""
    source = torch.zeros(64 * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        start_s = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds) / (2 * source.numel())


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


if __name__ == "__main__":
    run_benchmark("operators", measure)
