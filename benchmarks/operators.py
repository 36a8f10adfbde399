"""The operators of `plait.ops` beside eager, TorchInductor and public kernels, at training sizes.

A rival is written as models write it; the public kernel is PyTorch's own function for the same, or
what transformers uses. The sides take turns; the target is on forward and backward together, which
are shown apart too. "Over the bound" is the time taken over the time that the operator's work needs
at least on this machine: its bytes at the speed of a large copy, or its products at that of a large
product, whichever takes longer. --part says which operators; each has a result of its own.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.result import Row, device, finish, make_on_device, run_levels
from plait.ops.adamw import AdamWSettings, adamw_step_, adamw_work
from plait.ops.attention import causal_attention, causal_attention_work
from plait.ops.dropout import dropout, dropout_work
from plait.ops.embedding import embedding, embedding_work
from plait.ops.expert_tokens import expert_order, expert_tokens_work, gather_rows, mix_rows, route
from plait.ops.gated import gated_work, geglu, swiglu
from plait.ops.grouped_linear import grouped_linear, grouped_linear_work
from plait.ops.layer_norm import layer_norm, layer_norm_work
from plait.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_work
from plait.ops.muon import MuonSettings, muon_step_, muon_work
from plait.ops.numerics import bfloat16_pays
from plait.ops.rms_norm import add_rms_norm, rms_norm_work
from plait.ops.rotary import rotary, rotary_work
from plait.ops.work import Work

EPS = 1e-6
NUM_EXPERTS, EXPERTS_PER_TOKEN = 8, 2
ROUNDS = 30
WARM_UP_ROUNDS = 3


@dataclass(frozen=True)
class Size:
    """A model's step: B sequences of T tokens, width D, inner width F, heads N of size H."""

    name: str
    dtype: torch.dtype
    B: int
    T: int
    D: int
    F: int
    N: int
    V: int
    H: int = 64
    num_layers: int = 4

    @property
    def M(self) -> int:
        """Tokens of the step."""
        return self.B * self.T


def _sizes() -> tuple[Size, ...]:
    """Those of step_time.py: bfloat16 only where products are not emulated."""
    small = torch.bfloat16 if bfloat16_pays(device()) else torch.float32
    name = f"stdlib_15m, {str(small).removeprefix('torch.')}"
    return (
        Size(name, small, B=4, T=512, D=320, F=896, N=5, V=16_384),
        Size("Llama 0.2B, float32", torch.float32, B=1, T=512, D=1024, F=2816, N=16, V=32_000),
    )


SIZES = _sizes()


@dataclass(frozen=True)
class Case:
    """An operator: ours, as models write it, and a public function; what it is given."""

    name: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    operands: Sequence[Tensor]
    work: tuple[Work, Work]
    public: dict[str, Callable[..., Any]] = field(default_factory=dict)
    rounds: int = ROUNDS


def row_cases(size: Size) -> Iterator[Case]:
    """What works on rows, and is bound by memory."""
    x, residual = _draw(size, size.M, size.D), _draw(size, size.M, size.D)
    weight, bias = _draw(size, size.D), _draw(size, size.D)

    def plain_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        wide = total.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        return weight * normed.to(x.dtype), total

    def public_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return functional.rms_norm(total, (size.D,), weight, EPS), total

    yield Case(
        "RMSNorm with residual",
        partial(add_rms_norm, eps=EPS),
        plain_norm,
        (x, residual, weight),
        rms_norm_work(x, weight, residual),
        {"PyTorch's rms_norm": public_norm},
    )
    yield Case(
        "LayerNorm",
        partial(layer_norm, eps=EPS),
        lambda x, weight, bias: functional.layer_norm(x, (size.D,), weight, bias, EPS),
        (x, weight, bias),
        layer_norm_work(x, weight),
    )
    heads = _heads(size)
    angles = torch.randn(1, 1, size.T, size.H // 2).repeat(1, 1, 1, 2).to(size.dtype)
    tables = (angles.cos(), angles.sin())
    yield Case(
        "rotary embedding", rotary, plain_rotary, (heads, *tables), rotary_work(heads, angles)
    )
    gate, up = _draw(size, size.M, size.F), _draw(size, size.M, size.F)
    for name, ours, f in (("SwiGLU", swiglu, functional.silu), ("GeGLU", geglu, functional.gelu)):
        yield Case(name, ours, lambda g, u, f=f: f(g) * u, (gate, up), gated_work(gate))
    yield Case(
        "dropout",
        partial(dropout, p=0.1, seed=0),
        lambda x: functional.dropout(x, 0.1),
        (x,),
        dropout_work(x),
    )
    table, tokens = _draw(size, size.V, size.D), torch.randint(0, size.V, (size.M,))
    yield Case(
        "embedding",
        partial(embedding, tokens),
        lambda table: functional.embedding(tokens, table),
        (table,),
        embedding_work(tokens, table),
    )


def product_cases(size: Size) -> Iterator[Case]:
    """What is bound by products of matrices."""
    q, k, v = _heads(size), _heads(size), _heads(size)
    scale = size.H**-0.5
    yield Case(
        "causal attention",
        partial(causal_attention, scale=scale),
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        (q, k, v),
        causal_attention_work(q, k, v),
    )
    window = size.T // 4
    ago = torch.arange(size.T)[:, None] - torch.arange(size.T)
    mask = (ago >= 0) & (ago < window)
    yield Case(
        f"causal attention in a window of {window}",
        partial(causal_attention, scale=scale, window=window),
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        (q, k, v),
        causal_attention_work(q, k, v, window=window),
    )
    yield _experts(size)
    hidden = _draw(size, size.M, size.D)
    weight = (0.02 * torch.randn(size.V, size.D)).to(size.dtype).requires_grad_()
    targets = torch.randint(0, size.V, (size.M,))

    def plain_loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = functional.linear(hidden, weight).float()
        return functional.cross_entropy(logits, targets, reduction="sum")

    options = torch.nn.LinearCrossEntropyOptions()  # which asks for parts of the logits at a time
    yield Case(
        "loss without logits",
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets),
        plain_loss,
        (hidden, weight),
        linear_cross_entropy_work(hidden, weight),
        {
            "PyTorch's linear_cross_entropy": lambda hidden, weight: (
                functional.linear_cross_entropy(
                    hidden, weight, targets, reduction="sum", options=options
                )
            )
        },
        rounds=4,
    )


def _experts(size: Size) -> Case:
    """A layer of experts, its router's scores given; the rival walks through the experts."""
    inner = size.F // EXPERTS_PER_TOKEN
    x, scores = _draw(size, size.M, size.D), _draw(size, size.M, NUM_EXPERTS)
    gate, up = (_draw(size, NUM_EXPERTS, inner, size.D, scale=size.D**-0.5) for _ in range(2))
    down = _draw(size, NUM_EXPERTS, size.D, inner, scale=inner**-0.5)

    def layer(product: Callable, x: Tensor, scores: Tensor, *weights: Tensor) -> Tensor:
        gate, up, down = weights
        shares, chosen = route(scores, EXPERTS_PER_TOKEN)
        order = expert_order(chosen, NUM_EXPERTS)
        rows = gather_rows(x, order)
        inner = swiglu(product(rows, gate, order.ends_E), product(rows, up, order.ends_E))
        return mix_rows(product(inner, down, order.ends_E), shares, order)

    def public_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        return functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends.int())

    def plain(x: Tensor, scores: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        shares, chosen = scores.float().softmax(-1).topk(EXPERTS_PER_TOKEN, -1)
        shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype)
        mixed = torch.zeros_like(x)
        for expert in range(NUM_EXPERTS):
            token, choice = torch.where(chosen == expert)
            rows = x[token]
            inner = functional.silu(rows @ gate[expert].T) * (rows @ up[expert].T)
            mixed.index_add_(0, token, inner @ down[expert].T * shares[token, choice, None])
        return mixed

    order = expert_order(scores.topk(EXPERTS_PER_TOKEN, -1).indices, NUM_EXPERTS)
    rows = gather_rows(x, order).detach()
    inner_rows = rows.new_empty(len(rows), inner)
    works = [
        expert_tokens_work(rows, x),
        gated_work(inner_rows),
        *(grouped_linear_work(rows, weight) for weight in (gate, up)),
        grouped_linear_work(inner_rows, down),
    ]
    forward, backward = (sum(parts[1:], parts[0]) for parts in zip(*works, strict=True))
    return Case(
        f"{NUM_EXPERTS} experts, {EXPERTS_PER_TOKEN} for each token",
        partial(layer, grouped_linear),
        plain,
        (x, scores, gate, up, down),
        (forward, backward),
        {"PyTorch's grouped_mm": partial(layer, public_product)},
        rounds=6,
    )


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of the two halves of a head."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def measure_cases(cases: Callable[[Size], Iterator[Case]], quick: bool) -> list[Row]:
    """Time all of them at each size."""
    make_on_device()
    speeds = Speeds()
    rows = []
    for size in SIZES:
        torch.manual_seed(0)
        for case in cases(size):
            rows += _case_rows(case, size, speeds, min(3, case.rounds) if quick else case.rounds)
    return rows


def measure_optimizers(quick: bool) -> list[Row]:
    """One step over the matrices of some layers; the rivals are torch.optim's.

    Muon's rivals multiply in bfloat16, which takes seconds for each matrix on a CPU without units
    for it: fewer matrices and rounds.
    """
    make_on_device()
    speeds, rows = Speeds(), []
    for size in SIZES:
        attention, inner = (size.D, size.D), (size.F, size.D)
        layer = [*[attention] * 4, *[inner] * 2, inner[::-1]]
        muon, muon_rounds = (layer, 10) if size.D < 512 else ([inner], 3)
        for name, make, shapes, rounds in (
            ("AdamW step", _adamw_sides, layer * size.num_layers, ROUNDS),
            ("Muon step", _muon_sides, muon, muon_rounds),
        ):
            torch.manual_seed(0)
            torch._dynamo.reset()
            parameters = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes]
            for p in parameters:
                p.grad = torch.randn_like(p)
            sides, work = make(parameters)
            times = _in_turn(sides, 3 if quick else rounds)
            claim = f"{name}, {len(shapes)} matrices of {size.name.split(',')[0]}"
            rows += _compared(claim, times)
            bound_s = speeds.bound_s(work, torch.float32)
            rows.append(_row(f"{claim}: over the bound", [s / bound_s for s in times["plait"]]))
    return rows


def _adamw_sides(parameters: list[torch.nn.Parameter]) -> tuple[dict[str, Callable], Work]:
    moments = [[torch.zeros_like(p, requires_grad=False) for p in parameters] for _ in range(2)]
    steps = [torch.zeros(()) for _ in parameters]
    settings = AdamWSettings(learning_rate=1e-5)
    gradients = [p.grad for p in parameters if p.grad is not None]
    make = partial(torch.optim.AdamW, parameters, lr=1e-5)
    return {
        "plait": partial(adamw_step_, parameters, gradients, *moments, steps, settings),
        "eager": make().step,
        "Inductor": torch.compile(make().step),
        "PyTorch's fused AdamW": make(fused=True).step,
    }, adamw_work(parameters)


def _muon_sides(parameters: list[torch.nn.Parameter]) -> tuple[dict[str, Callable], Work]:
    momenta = [torch.zeros_like(p, requires_grad=False) for p in parameters]
    gradients = [p.grad for p in parameters if p.grad is not None]
    settings = MuonSettings(learning_rate=1e-5)
    make = partial(torch.optim.Muon, parameters, lr=1e-5)
    return {
        "plait": partial(muon_step_, parameters, gradients, momenta, settings),
        "eager": make().step,
        "Inductor": torch.compile(make().step),
    }, muon_work(parameters)


class Speeds:
    """What the machine can do: seconds of a byte in a large copy, of a flop in a large product."""

    def __init__(self) -> None:
        """Measure the copy."""
        source = torch.zeros(64 * 2**20, dtype=torch.uint8)
        target = torch.empty_like(source)
        self.byte_s = _median_s(lambda: target.copy_(source)) / (2 * source.numel())
        self.flop_s: dict[torch.dtype, float] = {}

    def bound_s(self, work: Work, dtype: torch.dtype) -> float:
        """Time that the work takes at least."""
        if dtype not in self.flop_s:
            a = torch.randn(1024, 1024).to(dtype)
            self.flop_s[dtype] = _median_s(lambda: a @ a, 3) / (2 * 1024**3)
        return max(work.bytes * self.byte_s, work.flops * self.flop_s[dtype])


def _case_rows(case: Case, size: Size, speeds: Speeds, rounds: int) -> list[Row]:
    torch._dynamo.reset()
    sides = {
        "plait": case.ours,
        "eager": case.plain,
        "Inductor": torch.compile(case.plain),
        **case.public,
    }
    with_gradient = [x for x in case.operands if x.requires_grad]
    tangents = [torch.randn_like(x) for x in _tuple(case.plain(*case.operands))]
    results: dict[str, Any] = {}

    def forward(name: str) -> None:
        results[name] = _tuple(sides[name](*case.operands))

    def backward(name: str) -> None:
        torch.autograd.grad(results.pop(name), with_gradient, tangents)

    times = _in_turn(
        {name: partial(forward, name) for name in sides},
        rounds,
        {name: partial(backward, name) for name in sides},
    )
    whole = {name: [sum(pair) for pair in pairs] for name, pairs in times.items()}
    name = f"{case.name}, {size.name}"
    rows = _compared(f"{name}: forward and backward", whole)
    for i, way in enumerate(("forward", "backward")):
        apart = {name: [pair[i] for pair in pairs] for name, pairs in times.items()}
        rows += _compared(f"{name}: {way}", apart, target=None)
        bound_s = speeds.bound_s(case.work[i], size.dtype)
        claim = f"{name}: {way} over the bound"
        rows.append(_row(claim, [s / bound_s for s in apart["plait"]]))
    rows.append(
        Row(
            claim=f"{name}: bytes moved at least",
            unit="MB",
            target=None,
            better="lower",
            samples=[1e-6 * sum(case.work, Work(flops=0, bytes=0)).bytes],
        )
    )
    return rows


def _in_turn(
    sides: dict[str, Callable[[], object]],
    rounds: int,
    then: dict[str, Callable[[], object]] | None = None,
) -> dict[str, list]:
    """Seconds of each round of each side, as pairs where something follows."""
    times: dict[str, list] = {name: [] for name in sides}
    names = list(sides)
    warm_up = min(WARM_UP_ROUNDS, max(1, rounds // 4))
    for i in range(warm_up + rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            first_s = _timed_s(sides[name])
            times[name].append((first_s, _timed_s(then[name])) if then else first_s)
    return {name: seconds[warm_up:] for name, seconds in times.items()}


def _timed_s(function: Callable[[], object]) -> float:
    finish()
    start_s = time.perf_counter()
    function()
    finish()
    return time.perf_counter() - start_s


def _median_s(function: Callable[[], object], times: int = 10) -> float:
    return statistics.median(_timed_s(function) for _ in range(times))


def _compared(name: str, times: dict[str, list[float]], target: float | None = 1.0) -> list[Row]:
    rows = []
    for rival in [other for other in times if other != "plait"]:
        ratios = [ours / other for ours, other in zip(times["plait"], times[rival], strict=True)]
        claim = f"{name}: plait / {rival}"
        rows.append(Row(claim=claim, unit="x", target=target, better="lower", samples=ratios))
    return rows


def _row(claim: str, samples: list[float]) -> Row:
    return Row(claim=claim, unit="x", target=None, better="lower", samples=samples)


def _draw(size: Size, *shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(size.dtype).requires_grad_()


def _heads(size: Size) -> Tensor:
    """(B, N, T, H), laid out as projections make it."""
    by_tokens = torch.randn(size.B, size.T, size.N, size.H).to(size.dtype)
    return by_tokens.transpose(1, 2).requires_grad_()


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


if __name__ == "__main__":
    run_levels(
        "operators",
        {
            "rows": partial(measure_cases, row_cases),
            "products": partial(measure_cases, product_cases),
            "optimizers": measure_optimizers,
        },
        option="part",
    )
