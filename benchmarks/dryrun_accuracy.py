"""How far the dry run's memory is from the truth, on this machine's CPU or on its GPU.

    python -m benchmarks.dryrun_accuracy [--device cuda] [--quick]

On a GPU ranks of large jobs are compared (`dryrun_gpu`). On a CPU each recipe (`dryrun_recipes`)
runs six training steps in a process of its own, two for two ranks.
The stages of a pipeline are compared one by one; of other ranks, which are alike, the first is.
The truth is what PyTorch's allocator reports to the profiler, block by block (`allocator_events`):
the peak of the first step, and the median peak of the five later ones. Printed beside the errors:
the spread of these, and how many frees only a block at the same address told of, because gloo's
threads, whose work is not profiled to its end, were the last to let go.
The prediction is made in another process, from the recipe only, on fake tensors. Both count the
model, its optimizer and everything that a step allocates; allocator fragments are no part of it.
"""

import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import dryrun_gpu
from benchmarks.dryrun_recipes import RECIPES, Recipe
from benchmarks.dryrun_worker import measure_rank
from benchmarks.result import ROOT, Row, run_levels

QUICK = ("llama float32", "eager llama", "FSDP2 llama")
MEDIAN_TARGET, WORST_TARGET = 1.0, 3.0
TIME_LIMIT_S = 1800  # other work may stop a worker for minutes


def measure(quick: bool) -> list[Row]:
    """Compare every recipe, and print each."""
    # Those of several ranks first: there a prediction is most likely to be wrong.
    names = QUICK if quick else sorted(RECIPES, key=lambda name: -RECIPES[name].ranks)
    rows: list[Row] = []
    errors: list[float] = []
    predictions = predicted_alone(names)
    for name in names:
        truths = measured(RECIPES[name])
        found: list[float] = []
        for rank, (truth, predicted) in enumerate(zip(truths, predictions[name], strict=True)):
            both = [abs(predicted[step] / truth[step] - 1) * 100 for step in ("first", "later")]
            found += both
            print(
                f"  {name + (f', rank {rank}' if len(truths) > 1 else ''):34} "
                f"{truth['later'] / 2**20:9.2f} MiB  first {both[0]:.4f} %, "
                f"later {both[1]:.4f} %, spread of later steps {truth['spread'] * 100:.2f} %, "
                f"{truth['unseen_frees']} frees unseen",
                flush=True,
            )
        errors += found
        rows.append(_row(f"{name}: peak memory, error", None, [max(found)]))
    eager = [name for name in names if RECIPES[name].way == "eager" and RECIPES[name].parallel]
    count = (
        f"{len(names)} configurations, {len(eager)} of them FSDP2, DTensor or PyTorch's pipelining"
    )
    return [
        _row(f"peak memory of a step, median error, {count}", MEDIAN_TARGET, errors),
        _row(f"peak memory of a step, worst error, {count}", WORST_TARGET, [max(errors)]),
        *rows,
    ]


def measured(recipe: Recipe) -> list[dict[str, Any]]:
    """Figures of each of `recipe.unlike_ranks`.

    Each rank is a new process, of a server that has imported and run nothing. Raises RuntimeError
    if one ends without figures.
    """
    ranks = multiprocessing.get_context("forkserver")
    ranks.set_forkserver_preload(["benchmarks.dryrun_worker", "transformers"])
    receive, send = ranks.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        processes = [
            ranks.Process(target=measure_rank, args=(recipe.name, rank, store, send))
            for rank in range(recipe.ranks)
        ]
        try:
            for each in processes:
                each.start()
            send.close()
            found: dict[int, dict[str, Any]] = {}
            for _ in recipe.unlike_ranks:
                if not receive.poll(TIME_LIMIT_S):
                    raise RuntimeError(f"{recipe.name} took more than {TIME_LIMIT_S} s.")
                rank, figures = receive.recv()
                found[rank] = figures
            return [found[rank] for rank in recipe.unlike_ranks]
        except EOFError as error:
            raise RuntimeError(f"{recipe.name} ended without figures.") from error
        finally:
            for each in processes:
                each.join(10)
                each.kill()


def predicted_alone(names: Sequence[str]) -> dict[str, Any]:
    """Figures of each recipe from itself alone, by a process that measures nothing."""
    command = [sys.executable, "-m", "benchmarks.dryrun_worker", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(f"the prediction gave no result:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1])


def _row(claim: str, target: float | None, samples: list[float]) -> Row:
    return Row(claim=claim, unit="%", target=target, better="lower", samples=samples)


if __name__ == "__main__":
    run_levels("dryrun_accuracy", {"cpu": measure, "cuda": dryrun_gpu.measure}, "device")
