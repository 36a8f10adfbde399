"""How far the dry run's memory is from the truth, on this machine's CPU.

Each recipe (`dryrun_recipes`) runs six training steps in a process of its own, two for two ranks.
The truth is what PyTorch's allocator reports to the profiler, block by block (`allocator_events`):
the peak of the first step, and the median peak of the five later ones. Printed beside the errors:
the spread of these, and how many frees only a block at the same address told of, because gloo's
threads, whose work is not profiled to its end, were the last to let go.
The prediction is made in another process, from the recipe only, on fake tensors. Both count the
model, its optimizer and everything that a step allocates; allocator fragments are no part of it.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.dryrun_recipes import RECIPES, Recipe
from benchmarks.result import ROOT, Row, run_benchmark

QUICK = ("llama float32", "eager llama", "FSDP2 llama")
MEDIAN_TARGET, WORST_TARGET = 1.0, 3.0
TIME_LIMIT_S = 1800  # other work may stop a worker for minutes
_WORKER = [sys.executable, "-m", "benchmarks.dryrun_worker"]


def measure(quick: bool) -> list[Row]:
    """Compare every recipe, and print each."""
    names = QUICK if quick else tuple(RECIPES)
    rows: list[Row] = []
    errors: list[float] = []
    predictions = predicted_alone(names)
    for name in names:
        truth, predicted = measured(RECIPES[name]), predictions[name]
        both = [abs(predicted[step] / truth[step] - 1) * 100 for step in ("first", "later")]
        errors += both
        print(
            f"  {name:34} {truth['later'] / 2**20:9.2f} MiB  first {both[0]:.4f} %, "
            f"later {both[1]:.4f} %, spread of later steps {truth['spread'] * 100:.2f} %, "
            f"{truth['unseen_frees']} frees unseen",
            flush=True,
        )
        rows.append(_row(f"{name}: peak memory, error", None, [max(both)]))
    eager = [name for name in names if RECIPES[name].way == "eager" and RECIPES[name].parallel]
    count = f"{len(names)} configurations, {len(eager)} of them FSDP2 or DTensor"
    return [
        _row(f"peak memory of a step, median error, {count}", MEDIAN_TARGET, errors),
        _row(f"peak memory of a step, worst error, {count}", WORST_TARGET, [max(errors)]),
        *rows,
    ]


def measured(recipe: Recipe) -> dict[str, Any]:
    """Figures of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            subprocess.Popen(
                [*_WORKER, "measure", recipe.name, str(rank), store],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(recipe.ranks)
        ]
        try:
            printed = [rank.communicate(timeout=TIME_LIMIT_S) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
    return _json_of(printed[0][0], printed[0][1])


def predicted_alone(names: Sequence[str]) -> dict[str, Any]:
    """Figures of each recipe from itself alone, by a process that measures nothing."""
    command = [*_WORKER, "predict", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return _json_of(done.stdout, done.stderr)


def _json_of(text: str, errors: str) -> dict[str, Any]:
    lines = [line for line in text.splitlines() if line.startswith("{")]
    if not lines:
        message = f"a worker printed no result:\n{errors[-2000:]}"
        raise RuntimeError(message)
    return json.loads(lines[-1])


def _row(claim: str, target: float | None, samples: list[float]) -> Row:
    return Row(claim=claim, unit="%", target=target, better="lower", samples=samples)


if __name__ == "__main__":
    run_benchmark("dryrun_accuracy", measure)
