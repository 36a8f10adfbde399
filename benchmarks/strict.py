"""Strict numerics: rows are equal bit for bit however they are batched, and what that costs.

A row is equal if its output and its input gradient have the same bits as in one large call. The
cost is that of strict over that of fast, in pairs that are run in turns.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.result import Row, run_benchmark
from plait.models.decoder import Decoder, DecoderConfig
from plait.ops.strict_attention import strict_causal_attention
from plait.ops.strict_linear import strict_linear
from plait.recipes.stdlib import stdlib_15m

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDE = DecoderConfig(
    vocab_size=1024,
    hidden_size=1024,
    intermediate_size=2816,
    num_layers=1,
    num_heads=16,
    num_kv_heads=16,
    head_size=64,
)
LARGE_ROWS = (1000, 2048, 4097)


def measure(quick: bool) -> list[Row]:
    """Count unequal rows of each operation and of a model, then time."""
    rows = [row for dtype in DTYPES for row in _equality_rows(dtype, quick)]
    rows += [_thread_row(dtype) for dtype in DTYPES]
    for num_threads in (1, 2):
        with _threads(num_threads):
            rows += _cost_rows(num_threads, quick)
    return rows


def _equality_rows(dtype_name: str, quick: bool) -> list[Row]:
    """Sum over one and two threads; the quick form takes one thread and fewer numbers of rows."""
    dtype = DTYPES[dtype_name]
    counts = [*range(1, 513, 73 if quick else 1), *(() if quick else LARGE_ROWS)]
    checks: dict[str, Callable[[], int]] = {
        "linear of width 64": lambda: _unequal_linear_rows(64, dtype, counts),
        "linear of width 1,024": lambda: _unequal_linear_rows(1024, dtype, counts),
        "attention": lambda: _unequal_queries(dtype, counts),
        "decoder layer, batches": lambda: _unequal_samples(dtype, quick),
        "decoder layer, chunks and cache": lambda: _unequal_chunks(dtype, quick),
    }
    totals = dict.fromkeys(checks, 0)
    for num_threads in (1,) if quick else (1, 2):
        with _threads(num_threads):
            for name, check in checks.items():
                totals[name] += check()
    threads = "1 thread" if quick else "1 and 2 threads"
    return [
        Row(
            claim=f"strict: rows that differ, {name}, {dtype_name}, {threads}",
            unit="rows",
            target=0.0,
            better="lower",
            samples=[float(total)],
        )
        for name, total in totals.items()
    ]


def _unequal_linear_rows(width: int, dtype: torch.dtype, counts: list[int]) -> int:
    """Compare every number of rows, at random places among random neighbours, with one call."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(4200, width, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(width, width, generator=generator).to(dtype)
    y, dx = strict_linear(x, weight), strict_linear(dy, weight.t())  # dx: what the backward runs
    unequal = 0
    for count in counts:
        rows = torch.randperm(4200, generator=generator)[:count]
        some_x = x[rows].requires_grad_()
        some_y = strict_linear(some_x, weight)
        (some_dx,) = torch.autograd.grad(some_y, some_x, dy[rows])
        unequal += _differing(some_y, y[rows]) + _differing(some_dx, dx[rows])
    return unequal


def _unequal_queries(dtype: torch.dtype, counts: list[int]) -> int:
    """Compare the last T of S positions of some sequences with the whole, for every T."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(3, heads, 560, 64, generator=generator).to(dtype) for heads in (2, 1, 1, 2)
    )
    q.requires_grad_()
    output = strict_causal_attention(q, k, v, scale=0.125)
    (dq,) = torch.autograd.grad(output, q, dout)
    unequal = 0
    for count in counts:
        if count > 560:
            continue
        stop = int(torch.randint(count, 561, (), generator=generator))
        some = torch.randperm(3, generator=generator)[: 1 + count % 2]
        queries = slice(stop - count, stop)
        some_q = q.detach()[some, :, queries].requires_grad_()
        found = strict_causal_attention(some_q, k[some, :, :stop], v[some, :, :stop], scale=0.125)
        (found_dq,) = torch.autograd.grad(found, some_q, dout[some, :, queries])
        unequal += _differing(found, output[some, :, queries])
        unequal += _differing(found_dq, dq[some, :, queries])
    return unequal


def _unequal_samples(dtype: torch.dtype, quick: bool) -> int:
    """Compare samples of a batch with the same samples in smaller batches, gradients included."""
    model = _model(replace(WIDE, numerics="strict")).to(dtype)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 1024, (5, 130), generator=generator)
    dhidden = torch.randn(5, 130, 1024, generator=generator).to(dtype)

    def run(rows: list[int]) -> tuple[Tensor, Tensor]:
        embedded: list[Tensor] = []
        hook = model.layers[0].register_forward_pre_hook(lambda _, args: embedded.append(args[0]))
        hidden = model(tokens[rows])
        hook.remove()
        return hidden.detach(), torch.autograd.grad(hidden, embedded[0], dhidden[rows])[0]

    whole = run([0, 1, 2, 3, 4])
    unequal = 0
    for rows in [[2], [4, 0]] if quick else [[0], [2], [4, 0], [1, 3, 2], [4, 3, 2, 1]]:
        unequal += sum(
            _differing(part, all_[rows]) for part, all_ in zip(run(rows), whole, strict=True)
        )
    return unequal


@torch.no_grad()
def _unequal_chunks(dtype: torch.dtype, quick: bool) -> int:
    """Compare prefill in chunks and decoding with a cache with one forward."""
    model = _model(replace(WIDE, numerics="strict")).to(dtype)
    tokens = torch.randint(0, 1024, (2, 300), generator=torch.Generator().manual_seed(1))
    whole = model(tokens)
    unequal = 0
    plans = [[128, 172], [1, 37, 200, 50, *[1] * 12]]
    for parts in plans[1:] if quick else [*plans, [270, *[1] * 30]]:
        cache = model.make_cache(batch_size=2, capacity=311)
        chunks = [model(part, cache=cache) for part in tokens.split(parts, dim=1)]
        unequal += _differing(torch.cat(chunks, dim=1), whole)
    return unequal


def _thread_row(dtype: str) -> Row:
    """Compare one thread with two."""
    results = []
    for num_threads in (1, 2):
        with _threads(num_threads), torch.no_grad():
            model = _model(replace(WIDE, numerics="strict")).to(DTYPES[dtype])
            tokens = torch.randint(0, 1024, (2, 300), generator=torch.Generator().manual_seed(1))
            results.append(model(tokens))
    return Row(
        claim=f"rows that differ between 1 and 2 threads, decoder layer, {dtype}",
        unit="rows",
        target=None,
        better="lower",
        samples=[float(_differing(*results))],
    )


def _cost_rows(num_threads: int, quick: bool) -> list[Row]:
    """Time strict over fast on 2,048 tokens, as 4 samples of 512."""
    threads = f"{num_threads} thread{'s'[: num_threads - 1]}"
    narrow = stdlib_15m().model
    rows = [
        _cost_row(
            f"2,048 tokens, linear 1,024 to 4,096, {dtype}, {threads}",
            _linear_pair(dtype),
            quick,
            target=None,
        )
        for dtype in DTYPES
    ]
    rows += [
        _cost_row(
            f"one token for each of {batch}, stdlib_15m, {dtype}, {threads}",
            _decode_pair(narrow, DTYPES[dtype], batch),
            quick,
            target=None,
        )
        for batch in (1, 16)
        for dtype in DTYPES
    ]
    for name, config in (("decoder layer, width 1,024", WIDE), ("stdlib_15m, width 320", narrow)):
        for dtype in DTYPES:
            left_out = quick and (num_threads == 2 or config is WIDE)
            claim = f"2,048 tokens, {name}, {dtype}, {threads}"
            rows += [
                _cost_row(claim, None if left_out else _model_pair(config, dtype, False), quick),
                _cost_row(
                    f"{claim}, with backward",
                    None if left_out else _model_pair(config, dtype, True),
                    quick,
                    target=None,
                ),
            ]
    return rows


Pair = tuple[Callable[[], object], Callable[[], object]]


def _cost_row(claim: str, pair: Pair | None, quick: bool, *, target: float | None = 1.5) -> Row:
    # The rows without a target take most of the time and get fewer pairs.
    num_pairs = 3 if quick else (5 if target is None else 9)
    samples = [] if pair is None else _ratios(pair, num_pairs)
    return Row(
        claim=f"strict over fast, {claim}",
        unit="times",
        target=target,
        better="lower",
        samples=samples,
        full_only=pair is None,
    )


def _ratios(pair: Pair, num_pairs: int) -> list[float]:
    """Run fast and strict in turns, after one unmeasured run of each."""
    seconds: list[list[float]] = [[], []]
    for round_ in range(num_pairs + 1):
        for function, times in zip(pair, seconds, strict=True):
            start = time.perf_counter()
            function()
            if round_:
                times.append(time.perf_counter() - start)
    return [strict / fast for fast, strict in zip(*seconds, strict=True)]


def _linear_pair(dtype: str) -> Pair:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 1024, generator=generator).to(DTYPES[dtype])
    weight = torch.randn(4096, 1024, generator=generator).to(DTYPES[dtype])
    return lambda: linear(x, weight), lambda: strict_linear(x, weight)


def _model_pair(config: DecoderConfig, dtype: str, with_backward: bool) -> Pair:
    """Hidden states of a training step: float32 weights, products in `dtype`, as `train/` does."""
    tokens = torch.randint(0, 1024, (4, 512), generator=torch.Generator().manual_seed(1))

    def make(model: Decoder) -> Callable[[], object]:
        def run() -> None:
            with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32"):
                hidden = model(tokens)
            if with_backward:
                hidden.sum().backward()
                model.zero_grad()

        return run

    strict = replace(config, numerics="strict")
    return make(_model(config)), make(_model(strict))


def _decode_pair(config: DecoderConfig, dtype: torch.dtype, batch: int) -> Pair:
    """The step after 256 tokens in a cache."""

    def make(model: Decoder) -> Callable[[], object]:
        cache = model.make_cache(batch_size=batch, capacity=300)

        @torch.no_grad()
        def run() -> None:
            cache.length = 256
            model.logits(model(torch.zeros(batch, 1, dtype=torch.long), cache=cache))

        return run

    strict = replace(config, numerics="strict")
    return make(_model(config).to(dtype)), make(_model(strict).to(dtype))


def _model(config: DecoderConfig) -> Decoder:
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(0))
    return model


def _differing(found: Tensor, expected: Tensor) -> int:
    """Count the rows (last dim) that have not the same bits."""
    kind = torch.int32 if found.dtype == torch.float32 else torch.int16
    found, expected = (t.detach().contiguous().view(kind) for t in (found, expected))
    return int((found != expected).any(dim=-1).sum())


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    run_benchmark("strict", measure)
