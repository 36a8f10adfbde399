"""Time and memory of a training step at O0, which runs eager's kernels, beside eager.

A step is forward, loss and backward. The two sides share one model and take turns, so that each
pair sees the same machine; memory is what PyTorch's allocator counts, each side in its own process.
With --level O1 or O2, see `step_time_levels.py`; each level has a result of its own.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.result import ROOT, Row, device, finish, run_levels

LLAMA = {
    "llama_float32": "Llama 0.2B, 512 tokens, float32",
    "llama_bfloat16": "Llama 0.2B, 512 tokens, bfloat16",
}
SIDES = ("eager", "O0")
WARM_UP_PAIRS = 3
QUICK_PAIRS = 5
PAIRS, MORE_PAIRS, MAX_PAIRS = 64, 32, 192
PRECISION = 0.01  # half of the interval's width: more pairs are timed until it is this narrow
NUM_RESAMPLES = 10_000
DISTURBED = 2.0
"""Times its own median: a step that took longer was interrupted by something else. A pair with one
has no say in the geometric mean, in which a single pause of seconds outweighs a hundred pairs; it
has in the median."""


def workloads() -> dict[str, str]:
    """What is compared, by what it is called: bfloat16 only where products are not emulated."""
    from plait.ops.numerics import bfloat16_pays

    pays = bfloat16_pays(device())
    chosen = {"stdlib_15m": f"stdlib_15m, {'bfloat16' if pays else 'float32'}"}
    return chosen | {key: name for key, name in LLAMA.items() if pays or "bfloat16" not in key}


def measure(quick: bool) -> list[Row]:
    """Compare time, then memory, of each workload."""
    rows: list[Row] = []
    for workload, name in workloads().items():
        if quick and workload != "stdlib_15m":
            rows.append(Row(claim=name, unit="x", target=1.02, better="lower", full_only=True))
            continue
        timed = _child(workload=workload, quick=quick)
        rows += _time_rows(name, timed)
        peaks = {side: _child(workload=workload, side=side)["peak_bytes"] for side in SIDES}
        rows += _memory_rows(name, peaks)
    return rows


def _time_rows(name: str, timed: dict[str, list[float]]) -> list[Row]:
    ratios, quiet = _ratios(timed), _undisturbed(timed)
    upper_ends = {
        "median": interval(ratios, statistics.median)[1],
        "geometric mean of undisturbed pairs": interval(quiet, statistics.geometric_mean)[1],
    }
    return [
        *(
            _row(f"{name}: time, O0 / eager, {kind}, upper end of 95 %", "x", 1.02, [upper])
            for kind, upper in upper_ends.items()
        ),
        _row(f"{name}: time, O0 / eager, each pair", "x", None, ratios),
        _row(f"{name}: disturbed pairs", "of all", None, [1 - len(quiet) / len(ratios)]),
        _row(f"{name}: time of an eager step", "ms", None, [1e3 * s for s in timed["eager"]]),
    ]


def _memory_rows(name: str, peaks: dict[str, float]) -> list[Row]:
    ratio = peaks["O0"] / peaks["eager"]
    return [
        _row(f"{name}: peak memory above the weights, O0 / eager", "x", 1.02, [ratio]),
        _row(f"{name}: peak memory of an eager step", "MB", None, [peaks["eager"] * 1e-6]),
    ]


def _row(claim: str, unit: str, target: float | None, samples: list[float]) -> Row:
    return Row(claim=claim, unit=unit, target=target, better="lower", samples=samples)


def interval(values: list[float], statistic: Callable[[Any], float]) -> tuple[float, float]:
    """Percentile bootstrap, 95 % [Efron and Tibshirani 1993, section 13.3]."""
    import numpy as np

    generator = np.random.default_rng(0)
    draws = generator.choice(values, (NUM_RESAMPLES, len(values)))
    low, high = np.percentile([statistic(draw.tolist()) for draw in draws], [2.5, 97.5])
    return float(low), float(high)


def _child(**arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.step_time", "--child", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _time(workload: str, quick: bool) -> dict[str, list[float]]:
    """Time the sides in turn; each pair begins with the other side.

    Single pairs scatter by a third on a machine that others use too. How many are timed follows
    from how much they scatter, never from which side is ahead.
    """
    import plait

    eager, batch, parameters = workload_of(workload)
    sides = {"eager": eager, "O0": plait.jit(eager, level="O0")}
    _check_bits(sides, batch, parameters)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    pairs = WARM_UP_PAIRS + (QUICK_PAIRS if quick else PAIRS)
    while True:
        for pair in range(pairs):
            for side in SIDES if pair % 2 == 0 else SIDES[::-1]:
                clear(parameters)
                finish()
                start_s = time.perf_counter()
                sides[side](*batch).backward()
                finish()
                times[side].append(time.perf_counter() - start_s)
        timed = {side: seconds[WARM_UP_PAIRS:] for side, seconds in times.items()}
        if quick or len(timed["O0"]) >= MAX_PAIRS or _is_precise(timed):
            return timed
        pairs = MORE_PAIRS


def _ratios(timed: dict[str, list[float]]) -> list[float]:
    return [ours / eager for ours, eager in zip(timed["O0"], timed["eager"], strict=True)]


def _undisturbed(timed: dict[str, list[float]]) -> list[float]:
    """Ratios of the pairs in which neither side was disturbed, each by its own median."""
    limits = {side: DISTURBED * statistics.median(seconds) for side, seconds in timed.items()}
    pairs = zip(timed["O0"], timed["eager"], strict=True)
    return [x / y for x, y in pairs if x <= limits["O0"] and y <= limits["eager"]]


def _is_precise(timed: dict[str, list[float]]) -> bool:
    ends = [
        interval(_ratios(timed), statistics.median),
        interval(_undisturbed(timed), statistics.geometric_mean),
    ]
    return all(high - low <= 2 * PRECISION for low, high in ends)


def _check_bits(sides: dict[str, Callable], batch: tuple, parameters: list) -> None:
    results = []
    for run in sides.values():
        clear(parameters)
        loss = run(*batch)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in parameters)])
    if not all(a.equal(b) for a, b in zip(*results, strict=True)):
        raise RuntimeError("O0 does not have the bits of eager")
    clear(parameters)


def _peak_bytes(workload: str, side: str) -> dict[str, float]:
    """Bytes that PyTorch's allocator holds at most during a warm step, less those before it."""
    import plait

    eager, batch, parameters = workload_of(workload)
    run = eager if side == "eager" else plait.jit(eager, level="O0")
    for _ in range(2):
        run(*batch).backward()
        clear(parameters)
    return {"peak_bytes": peak_bytes(lambda: run(*batch).backward())}


def peak_bytes(step: Callable[[], object]) -> float:
    """Bytes that PyTorch's allocator holds at most during a step, above those before it."""
    import torch

    if device() == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = list(_allocations(profile.profiler.kineto_results.experimental_event_tree()))
    events.sort(key=lambda event: event.start_time_ns)
    first = events[0].typed[1]
    before = first.total_allocated - first.alloc_size
    return max(event.typed[1].total_allocated for event in events) - before


def _allocations(events: list) -> Iterator[Any]:
    for event in events:
        if event.name == "[memory]":
            yield event
        yield from _allocations(event.children)


def clear(parameters: list) -> None:
    """Let go of the gradients."""
    for parameter in parameters:
        parameter.grad = None


def workload_of(name: str) -> tuple[Callable, tuple, list]:
    """Return loss function, its batch and the parameters."""
    import torch

    from plait.models.decoder import Decoder, DecoderConfig
    from plait.recipes.catalog import find_recipe
    from plait.train.step import summed_loss

    if name == "stdlib_15m":
        job = find_recipe(name)
        config, batch_size, length = job.model, job.micro_batch_size, job.sequence_length
        dtype = job.torch_dtype
    else:
        config = DecoderConfig(
            vocab_size=32_000,
            hidden_size=1024,
            intermediate_size=2816,
            num_layers=12,
            num_heads=16,
            num_kv_heads=8,
            head_size=64,
            max_positions=512,
        )
        batch_size, length, dtype = 1, 512, getattr(torch, name.removeprefix("llama_"))
    torch.manual_seed(0)
    model = Decoder(config)
    model.initialize()
    model.to(device())
    tokens = torch.randint(0, config.vocab_size, (batch_size, length + 1)).to(device())
    batch = (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())

    def loss(inputs_BT, targets_BT):
        return summed_loss(model, inputs_BT, targets_BT, dtype=dtype) / targets_BT.numel()

    return loss, batch, list(model.parameters())


def _of_level(level: str) -> Callable[[bool], list[Row]]:
    from benchmarks.step_time_levels import measure_level  # it needs this module

    return lambda quick: measure_level(level, quick)


if __name__ == "__main__":
    if "--child" in sys.argv:
        arguments = json.loads(sys.argv[-1])
        print(json.dumps((_peak_bytes if "side" in arguments else _time)(**arguments)))
    else:
        run_levels("step_time", {"O0": measure, "O1": _of_level("O1"), "O2": _of_level("O2")})
