"""How far the dry run's step time is from the truth on one GPU: `dryrun_time --device cuda`.

As on a CPU: steps that nobody observes are timed in turns with profiled ones, on the clock of the
GPU's events, and a table that has not seen half of the forms of each operator is asked for all of
them. Models have four layers, as wide as those of Llama 3's models from 1B to 8B, so that kernels
are what takes time.
"""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.dryrun_recipes import Recipe
from benchmarks.dryrun_time import (
    SEED,
    compare,
    half_of_each_operator,
    learn,
    pairs_of,
)
from benchmarks.dryrun_time_runs import Run, build, run_of
from benchmarks.result import Row, cluster_of_this_gpu
from plait.cost.accelerators import find_cluster

ROUNDS, QUICK_ROUNDS = 12, 3
_HEADS: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8}
_8B: dict[str, Any] = {**_HEADS, "hidden_size": 4096, "intermediate_size": 14336}
_3B: dict[str, Any] = {**_HEADS, "hidden_size": 3072, "intermediate_size": 8192}
_1B: dict[str, Any] = {**_HEADS, "hidden_size": 2048, "intermediate_size": 8192}
_LONG: dict[str, Any] = {"max_position_embeddings": 8192}
_GPT2: dict[str, Any] = {"n_embd": 1536, "n_head": 24, "n_positions": 2048}


def _llama(name: str, width: dict[str, Any], **settings: Any) -> Recipe:
    given: dict[str, Any] = {"batch": 2, "tokens": 4096, "dtype": torch.bfloat16, **settings}
    return Recipe(name=name, changes={**width, **_LONG}, **given)


RECIPES = (
    _llama("8B wide", _8B),
    _llama("8B wide, 8192 tokens", _8B, tokens=8192, batch=1),
    _llama("8B wide, recompute", _8B, recompute="full", batch=4),
    _llama("8B wide, 4 micro-batches", _8B, micro_batches=4, batch=4),
    _llama("8B wide, float32", _8B, dtype=torch.float32, tokens=2048, batch=1),
    _llama("3B wide", _3B),
    _llama("3B wide, selective recompute", _3B, recompute="selective", batch=4),
    _llama("3B wide, 2048 tokens, 8 rows", _3B, tokens=2048, batch=8),
    _llama("3B wide, sgd", _3B, optimizer="sgd"),
    _llama("1B wide", _1B),
    _llama("1B wide, 8 rows", _1B, batch=8),
    _llama("1B wide, 1024 tokens", _1B, tokens=1024, batch=4),
    _llama("1B wide, float32", _1B, dtype=torch.float32, tokens=2048),
    _llama("qwen3, 1B wide", {**_1B, "head_dim": 64}, model="qwen3"),
    _llama("olmo2, 1B wide, recompute", _1B, model="olmo2", recompute="full"),
    Recipe(name="gpt2", model="gpt2", changes=_GPT2, tokens=2048, batch=8, dtype=torch.bfloat16),
    Recipe(name="gpt2, float32", model="gpt2", changes=_GPT2, tokens=1024, batch=8),
)


def measure(quick: bool) -> list[Row]:
    """Compare every configuration. Exits without a GPU."""
    cluster = cluster_of_this_gpu("dryrun_time")
    recipes = RECIPES[::6] if quick else RECIPES
    return measure_on("cuda", cluster, recipes, QUICK_ROUNDS if quick else ROUNDS)


def measure_on(device: str, cluster: str, recipes: Sequence[Recipe], num_rounds: int) -> list[Row]:
    """Time, profile, learn and compare on a device that the cluster is made of."""
    torch.manual_seed(0)
    runs = [run_of(recipe, device) for recipe in recipes]
    for _ in range(num_rounds):
        for run in runs:
            _measure(run, device)
    pairs = pairs_of(runs)
    machine = find_cluster(cluster, 1).device
    table = learn(runs, half_of_each_operator(pairs, SEED), device=machine)
    seen = learn(runs[::2], device=machine)
    title = f"step time on {cluster}, {len(runs)} configurations"
    print("half of the pairs of operator and forms unseen", flush=True)
    found = compare(runs, table, cluster=cluster)
    print("every other configuration unseen", flush=True)
    others = compare(runs[1::2], seen, cluster=cluster)
    return [
        *found.rows(f"{title}, half of {len(pairs)} pairs unseen", median=5.0, worst=10.0),
        *others.rows(f"{title}, every other one never profiled", median=5.0, worst=10.0),
        *(
            Row(
                claim=f"{run.recipe.name}: step time, error",
                unit="%",
                target=None,
                better="lower",
                samples=[abs(error) * 100],
            )
            for run, error in zip(runs, found.errors, strict=True)
        ),
    ]


def _measure(run: Run, device: str) -> None:
    """A step and a profile. One model at a time is on the device: together they need not fit."""
    with torch.device(device):
        program = build(run.recipe, run.schedule)
    run.add(program.step_s(), program.profile())
