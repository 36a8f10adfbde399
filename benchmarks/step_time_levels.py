"""Time and memory of a training step at levels O1 and O2, beside torch.compile and eager.

The rival of O1 is torch.compile(), that of O2 torch.compile(mode="max-autotune"). All sides share
one model and take turns, so that each group of steps sees the same machine. The figure of a row is
the upper end of the 95 % interval of the median of the paired ratios.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.result import ROOT, Row, finish
from benchmarks.step_time import clear, interval, peak_bytes, workload_of, workloads

RIVALS = {"O1": {}, "O2": {"mode": "max-autotune"}}
TARGETS = {"O1": 1.02, "O2": 0.99}
EAGER_TARGET = 0.85
WARM_UP_ROUNDS = 3
TOLERANCE = {"stdlib_15m": 3e-2, "llama_float32": 1e-4, "llama_bfloat16": 3e-2}
"""Of a gradient, relative by norm: what bfloat16 (2^-8) and float32 leave after such a depth."""


def measure_level(level: str, quick: bool) -> list[Row]:
    """Compare time, then memory, of each workload."""
    rows: list[Row] = []
    for workload, name in workloads().items():
        if quick and workload != "stdlib_15m":
            rows.append(
                Row(claim=name, unit="x", target=TARGETS[level], better="lower", full_only=True)
            )
            continue
        rounds = 5 if quick else 30
        timed = _child(level=level, workload=workload, rounds=rounds)
        rows += _time_rows(level, name, timed)
        peaks = {
            side: _child(level=level, workload=workload, side=side)["peak_bytes"]
            for side in ("ours", "rival")
        }
        ratio = peaks["ours"] / peaks["rival"]
        claim = f"{name}: peak memory above the weights, {level} / {rival_name(level)}"
        rows += [
            _row(claim, "x", 1.0, [ratio]),
            _row(f"{name}: peak memory of {level}", "MB", None, [peaks["ours"] * 1e-6]),
        ]
    return rows


def rival_name(level: str) -> str:
    """What the level is compared with."""
    mode = RIVALS[level].get("mode")
    return f'torch.compile(mode="{mode}")' if mode else "torch.compile()"


def _time_rows(level: str, name: str, timed: dict[str, list[float]]) -> list[Row]:
    rows = []
    pairs = {
        rival_name(level): ("rival", TARGETS[level]),
        "eager": ("eager", EAGER_TARGET if level == "O1" else None),
    }
    for text, (side, target) in pairs.items():
        ratios = [ours / other for ours, other in zip(timed["ours"], timed[side], strict=True)]
        upper = interval(ratios, statistics.median)[1]
        claim = f"{name}: time, {level} / {text}"
        rows += [
            _row(f"{claim}, median, upper end of 95 %", "x", target, [upper]),
            _row(f"{claim}, each pair", "x", None, ratios),
        ]
    milliseconds = [1e3 * s for s in timed["ours"]]
    return [*rows, _row(f"{name}: time of a step at {level}", "ms", None, milliseconds)]


def _row(claim: str, unit: str, target: float | None, samples: list[float]) -> Row:
    return Row(claim=claim, unit=unit, target=target, better="lower", samples=samples)


def _child(**arguments: Any) -> dict[str, Any]:
    module = [sys.executable, "-m", "benchmarks.step_time_levels"]
    done = subprocess.run(
        [*module, json.dumps(arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _sides(level: str, eager: Callable) -> dict[str, Callable]:
    import torch

    import plait

    return {
        "ours": plait.jit(eager, level=level, cache=False),
        "rival": torch.compile(eager, **RIVALS[level]),
        "eager": eager,
    }


def _time(level: str, workload: str, rounds: int) -> dict[str, list[float]]:
    """Time the sides in turn; each round begins with another side."""
    eager, batch, parameters = workload_of(workload)
    sides = _sides(level, eager)
    _check(workload, sides, batch, parameters)
    times: dict[str, list[float]] = {side: [] for side in sides}
    names = list(sides)
    for i in range(WARM_UP_ROUNDS + rounds):
        for side in names[i % 3 :] + names[: i % 3]:
            clear(parameters)
            finish()
            start_s = time.perf_counter()
            sides[side](*batch).backward()
            finish()
            times[side].append(time.perf_counter() - start_s)
    return {side: seconds[WARM_UP_ROUNDS:] for side, seconds in times.items()}


def _check(workload: str, sides: dict[str, Callable], batch: tuple, parameters: list) -> None:
    """Raise unless all sides have the gradients of eager, but for rounding."""
    found: dict[str, list] = {}
    for side, run in sides.items():
        clear(parameters)
        run(*batch).backward()
        found[side] = [p.grad.double() for p in parameters]
    clear(parameters)
    for side, gradients in found.items():
        pairs = zip(gradients, found["eager"], strict=True)
        worst = max(((x - y).norm() / y.norm()).item() for x, y in pairs)
        if worst > TOLERANCE[workload]:
            raise RuntimeError(f"the gradients of {side} differ from eager's by {worst:.3g}")


def _peak(level: str, workload: str, side: str) -> dict[str, float]:
    eager, batch, parameters = workload_of(workload)
    run = _sides(level, eager)[side]
    for _ in range(2):
        run(*batch).backward()
        clear(parameters)
    return {"peak_bytes": peak_bytes(lambda: run(*batch).backward())}


if __name__ == "__main__":
    given = json.loads(sys.argv[-1])
    print(json.dumps((_peak if "side" in given else _time)(**given)))
