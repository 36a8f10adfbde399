"""How far the dry run's memory is from the truth on a GPU: `dryrun_accuracy --device cuda`.

Each rank (`dryrun_ranks`) runs its true program of a large job in a process of its own, on real
CUDA tensors. The part that PyTorch's caching allocator sees is compared: `max_memory_allocated` and
`max_memory_reserved`, of the first step and of later ones. CUDA's context and NCCL's buffers lie
outside of both.

Predictions are made before, in other processes, from the recipe only: of the program that this
GPU is given, and of the one that a machine without a GPU would capture.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch

from benchmarks.dryrun_rank_worker import Figures
from benchmarks.dryrun_ranks import RANKS
from benchmarks.result import ROOT, Row, cluster_of_this_gpu

QUICK = 3
LEAST = 20
TARGETS = {"allocated": 3.0, "reserved": 5.0}
NUM_PREDICTING = 8  # processes, beside the one that measures
ROOM_BYTES = 8 * 2**30  # of the device, for their contexts
TIME_LIMIT_S = 600
_ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")


def measure(quick: bool) -> list[Row]:
    """Compare every rank that this GPU has room for, and print each. Exits without a GPU."""
    cluster = cluster_of_this_gpu("dryrun_accuracy")
    numbers = range(len(RANKS))[:QUICK] if quick else range(len(RANKS))
    errors: dict[str, list[float]] = {}
    rows: list[Row] = []
    with ThreadPoolExecutor(min(NUM_PREDICTING, max(1, (os.cpu_count() or 2) // 2))) as pool:
        predictions = pool.map(lambda i: _predicted(i, cluster), numbers)
        for i, (predicted, without_gpu) in zip(numbers, predictions, strict=True):
            name, truth = RANKS[i].name, _truth(i, predicted, cluster)
            if isinstance(truth, str) or isinstance(predicted, str):
                print(f"  {name}: left out: {truth}", flush=True)
                continue
            found = errors_of(predicted, truth)
            print(f"  {name}: {describe(truth, found)}", flush=True)
            rows += [_row(f"{name}: {count}, error", None, [found[count]]) for count in TARGETS]
            if not isinstance(without_gpu, str):
                blind = errors_of(without_gpu, truth)
                found |= {f"{count}, captured without a GPU": x for count, x in blind.items()}
            for count, error in found.items():
                errors.setdefault(count, []).append(error)
    return [*summary(errors, least=QUICK if quick else LEAST), *rows]


def errors_of(predicted: Figures, truth: Figures) -> dict[str, float]:
    """By what is counted, the larger error of the first and of later steps, in percent."""
    found: dict[str, float] = {}
    for figure, value in truth.items():
        count, _, step = figure.partition(", ")
        if step in ("first", "later"):
            error = abs(predicted[figure] / value - 1) * 100
            found[count] = max(error, found.get(count, 0.0))
    return found


def describe(truth: Figures, errors: dict[str, float]) -> str:
    """A measured rank in a line."""
    sizes = ", ".join(
        f"{count} {truth[f'{count}, later'] / 2**30:.2f} GiB ({error:.2f} %)"
        for count, error in errors.items()
    )
    spread = max(truth[f"{count}, spread"] for count in errors)
    return f"{sizes}, spread of later steps {spread * 100:.2f} %"


def summary(errors: dict[str, list[float]], *, least: int) -> list[Row]:
    """Worst errors and medians over all ranks. What was not measured misses the count."""
    number = len(errors.get("allocated", []))
    count = Row(
        claim="ranks of large jobs that were measured",
        unit="",
        target=float(least),
        better="higher",
        samples=[float(number)],
    )
    rows = [count]
    for name, found in errors.items():
        what = {"allocated": "max_memory_allocated", "reserved": "max_memory_reserved"}
        counted, _, how = name.partition(", ")
        claim = f"{what.get(counted, f'{counted} bytes')}{f', {how}' if how else ''}"
        rows.append(_row(f"{claim}: worst error", TARGETS.get(name), [max(found)]))
        rows.append(_row(f"{claim}: median error", None, found))
    return rows


def worker(
    verb: Literal["measure", "predict"], device: str, cluster: str, number: int | str
) -> Figures | str:
    """What a process of its own finds, or why it ended without figures."""
    command = [sys.executable, "-m", "benchmarks.dryrun_rank_worker", verb, device, cluster]
    plain = {name: x for name, x in os.environ.items() if name not in _ALLOCATOR_SETTINGS}
    try:
        done = subprocess.run(
            [*command, str(number)],
            cwd=ROOT,
            env=plain,
            capture_output=True,
            text=True,
            check=False,
            timeout=TIME_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return f"took more than {TIME_LIMIT_S} s"
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return _last_line(done.stderr)
    return json.loads(lines[-1])[str(number)]


def _predicted(number: int, cluster: str) -> tuple[Figures | str, Figures | str]:
    """Of the program that the GPU is given, and of the one that is captured without it."""
    own = worker("predict", "cuda", cluster, number)
    return own, worker("predict", "cpu", cluster, number)


def _truth(number: int, predicted: Figures | str, cluster: str) -> Figures | str:
    """Measure where a prediction says that there is room for it."""
    if isinstance(predicted, str):
        return f"no prediction: {predicted}"
    room = torch.cuda.get_device_properties(0).total_memory - ROOM_BYTES
    if predicted["needed"] > room:
        return f"{predicted['needed'] / 2**30:.1f} GiB do not fit into {room / 2**30:.1f} GiB"
    return worker("measure", "cuda", cluster, number)


def _last_line(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines() or ["no message"]
    # Notes on an exception come behind its own line; what was raised says more.
    raised = [line for line in lines if "Error" in line.partition(":")[0]]
    return (raised or lines)[-1]


def _row(claim: str, target: float | None, samples: list[float]) -> Row:
    settings: dict[str, Any] = {"unit": "%", "target": target, "better": "lower"}
    return Row(claim=claim, samples=samples, **settings)
