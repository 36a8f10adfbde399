"""Processes of `dryrun_accuracy --device cuda`: one rank of a recipe, measured; or predicted.

    python -m benchmarks.dryrun_rank_worker measure cuda h200 NUMBER
    python -m benchmarks.dryrun_rank_worker predict cuda h200 NUMBER...
    python -m benchmarks.dryrun_rank_worker predict cpu h200 NUMBER...

each print JSON at the end: figures by the number of the recipe, in bytes. A prediction is of fake
tensors only. That of "cuda" captures the program that a GPU is given; that of "cpu" needs none, and
captures what a laptop can know of it. The measured process runs alone: other ranks are those of a
group whose collectives move nothing.

The truth is what PyTorch's caching allocator counts [docs.pytorch.org, torch.cuda.memory_stats]:
"allocated", in blocks; "requested", before they are rounded; "reserved" of the device. On a CPU it
is what the allocator tells the profiler, which is "requested".
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

import plait
from benchmarks.allocator_events import record
from benchmarks.dryrun_ranks import (
    RANKS,
    DeviceType,
    RankRecipe,
    RankWeights,
    cut_down,
    make_optimizer,
    make_schedule,
    make_tokens,
)
from plait.cost.accelerators import find_cluster
from plait.graph.plan_mesh import plan_mesh

NUM_STEPS = 4
COUNTS = ("requested", "allocated", "reserved")
Figures = dict[str, float]
Mark = Callable[[str], None]


def measure(recipe: RankRecipe, device: DeviceType, cluster: str) -> Figures:
    """Run real steps of the rank's program: peaks of the first, and medians of the later ones."""
    schedule = make_schedule(recipe, device, cluster)

    def run(mark: Mark) -> None:
        with plan_mesh(recipe.plan, device) as mesh:
            torch.manual_seed(0)
            held = RankWeights(schedule, recipe.plan, device)
            tokens_BT, optimizer = make_tokens(recipe, device), make_optimizer(recipe, held)
            for i in range(NUM_STEPS):
                mark(f"step {i}")
                plait.run(schedule, held, tokens_BT, optimizer=optimizer, mesh=mesh)
            mark("end")

    marks = [*(f"step {i}" for i in range(NUM_STEPS)), "end"]
    if device == "cpu":
        found = record(run)
        peaks = {"requested": [float(found.peak(a, b)) for a, b in pairwise(marks)]}
    else:
        peaks = record_gpu(run)
    return {
        figure: value
        for count, (first, *later) in peaks.items()
        for figure, value in (
            (f"{count}, first", first),
            (f"{count}, later", statistics.median(later)),
            (f"{count}, spread", max(later) / min(later) - 1),
        )
    }


def record_gpu(run: Callable[[Mark], None]) -> dict[str, list[float]]:
    """Peaks between marks, by what is counted.

    At the first mark what is cached and free is given back: the making of weights needed it.
    """
    peaks: dict[str, list[float]] = {count: [] for count in COUNTS}
    is_first = True

    def mark(name: str) -> None:
        nonlocal is_first
        torch.cuda.synchronize()
        if is_first:
            torch.cuda.empty_cache()
            is_first = False
        else:
            stats = torch.cuda.memory_stats()
            for count in COUNTS:
                peaks[count].append(float(stats[f"{count}_bytes.all.peak"]))
        torch.cuda.reset_peak_memory_stats()

    run(mark)
    return peaks


def predict(recipe: RankRecipe, device: DeviceType, cluster: str) -> Figures:
    """Say what the steps would use, on a GPU of the cluster, or on the "cpu" itself."""
    began_s = time.perf_counter()
    schedule = make_schedule(recipe, device, cluster)
    price = plait.price(schedule, find_cluster(cluster, recipe.plan.num_ranks))
    found: Figures = {}
    for step, ledger in (("first", price.first_memory), ("later", price.memory)):
        assert ledger.reserved is not None
        found[f"requested, {step}"] = ledger.peak_bytes
        found[f"allocated, {step}"] = ledger.reserved.used_bytes
        found[f"reserved, {step}"] = ledger.reserved.peak_bytes
    found["needed"] = price.memory.total_bytes
    return found | {"seconds": time.perf_counter() - began_s}


def main(arguments: list[str]) -> None:
    """Do what the command line says; a number behind "small" is of a recipe cut down."""
    verb, device, cluster, *numbers = arguments
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(0)
    work = measure if verb == "measure" else predict
    found: dict[str, Any] = {}
    for text in numbers:
        recipe = RANKS[int(text.removeprefix("small"))]
        recipe = cut_down(recipe) if text.startswith("small") else recipe
        found[text] = work(recipe, "cuda" if device == "cuda" else "cpu", cluster)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
