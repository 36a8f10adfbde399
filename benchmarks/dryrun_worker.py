"""Processes of `dryrun_accuracy`: one rank of a recipe, measured; or recipes, predicted.

    python -m benchmarks.dryrun_worker NAME...

prints predictions as JSON, one for each rank that is unlike others: bytes before the first step,
and the peaks of the first and of later ones.
"""

import json
import os
import statistics
import sys
import time
import warnings
from importlib import import_module
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

import plait
from benchmarks.allocator_events import record, reuse_addresses
from benchmarks.dryrun_recipes import (
    RECIPES,
    Recipe,
    build_eager,
    build_scheduled,
    make_schedule,
    plait_mesh,
)
from plait.dryrun.eager import trace_eager
from plait.dryrun.memory import ledger_of
from plait.dryrun.memory_trace import MemoryTrace

NUM_STEPS = 6
Figures = dict[str, Any]


def measure(recipe: Recipe) -> Figures:
    """Run real steps under the profiler."""
    schedule = make_schedule(recipe) if recipe.way == "schedule" else None

    def run(mark: Any) -> None:
        with plait_mesh(recipe) as mesh:
            mesh = mesh if recipe.parallel else None
            built = (
                build_eager(recipe, mesh)
                if schedule is None
                else build_scheduled(recipe, schedule, mesh)
            )
            for i in range(NUM_STEPS):
                mark(f"step {i}")
                built.step()
            mark("end")

    found = record(run)
    marks = [*(f"step {i}" for i in range(NUM_STEPS)), "end"]
    peaks = [found.peak(a, b) for a, b in pairwise(marks)]
    return {
        "start": found.at("step 0"),
        "first": peaks[0],
        "later": statistics.median(peaks[1:]),
        "spread": max(peaks[1:]) / min(peaks[1:]) - 1,
        "unseen_frees": len(found.unseen),
    }


def predict(recipe: Recipe, rank: int = 0) -> Figures:
    """Say what the steps of a rank would use, with fake tensors only."""
    if recipe.hugging_face:
        import_module("transformers")  # not within the trace: it would be taken for the model's
    began_s = time.perf_counter()
    if recipe.way == "schedule":
        price = plait.price(
            make_schedule(recipe), plait.clusters.cpu(recipe.ranks), fragments=False
        )
        first, later = price.first_memory.peak_bytes, price.memory.peak_bytes
        trace = price.trace
    else:
        trace, begins = predicted_trace(recipe, rank)
        first = ledger_of(trace, first=begins[0], last=begins[1] - 1, fragments=False).peak_bytes
        later = ledger_of(trace, first=begins[1], fragments=False).peak_bytes
    return {
        "start": trace_start(trace, recipe),
        "first": first,
        "later": later,
        "seconds": time.perf_counter() - began_s,
    }


def predicted_trace(recipe: Recipe, rank: int = 0) -> tuple[MemoryTrace, tuple[int, ...]]:
    """Two eager steps of a rank on fake tensors, and the moments at which they begin."""
    with plait_mesh(recipe, rank=rank) as mesh:
        run = trace_eager(lambda: build_eager(recipe, mesh if recipe.parallel else None))
    return run.trace, run.begins


def trace_start(trace: MemoryTrace, recipe: Recipe) -> int:
    """Bytes before the first step."""
    if recipe.way == "eager":
        return 0
    return sum(each.num_bytes for each in trace.storages if each.moment < 0)


def measure_rank(name: str, rank: int, store_file: str, send: Connection) -> None:
    """Measure in this process, and send the rank and its figures, if it is one to compare."""
    _prepare()
    reuse_addresses()
    recipe = RECIPES[name]
    if recipe.parallel:
        store = dist.FileStore(store_file, recipe.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=recipe.ranks)
    figures = measure(recipe)
    if rank in recipe.unlike_ranks:
        send.send((rank, figures))
    if recipe.parallel:
        dist.barrier()
        os._exit(0)  # gloo's threads may outlive the group


def _prepare() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)


if __name__ == "__main__":
    _prepare()
    recipes = [RECIPES[name] for name in sys.argv[1:]]
    print(json.dumps({x.name: [predict(x, rank) for rank in x.unlike_ranks] for x in recipes}))
