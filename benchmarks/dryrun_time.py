"""How far the dry run's step time is from the truth, on one core of this machine.

The recipes of `dryrun_recipes` that one rank runs by a schedule. Every other one is profiled, and a
table is learnt from these profiles as `plait calibrate` does; all are timed without an observer, in
turns with the profiles, so that both see the same machine. The prediction knows the table and the
schedule. Printed beside each error: the spread of the measured steps, and how many of its operators
and forms the table has not seen.
"""

import statistics
import time
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch

import plait
from benchmarks.dryrun_recipes import (
    RECIPES,
    Recipe,
    make_model,
    make_optimizer,
    make_schedule,
    make_tokens,
)
from benchmarks.result import Row, run_benchmark
from plait.cost.table import Source, Table
from plait.cost.timeline import Timeline
from plait.dryrun.learn import MeasuredSteps, learn_table
from plait.dryrun.price import Price
from plait.executor.profile import profile_step
from plait.graph.schedule import Schedule

WARM_UP, ROUNDS, QUICK_ROUNDS = 2, 7, 3
QUICK = 5


@dataclass
class Run:
    """A recipe on real tensors, and what was measured of it."""

    recipe: Recipe
    schedule: Schedule
    model: Any
    tokens_BT: torch.Tensor
    optimizer: Any
    steps_s: list[float] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)

    def step(self) -> None:
        """Time one step."""
        start_s = time.perf_counter()
        plait.run(self.schedule, self.model, self.tokens_BT, optimizer=self.optimizer)
        self.steps_s.append(time.perf_counter() - start_s)

    def profile(self) -> None:
        """Profile one step."""
        found = profile_step(self.schedule, self.model, self.tokens_BT, optimizer=self.optimizer)
        self.timelines.append(found.timeline)


def measure(quick: bool) -> list[Row]:
    """Learn from half of the runs, and compare all of them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipes = [r for r in RECIPES.values() if r.way == "schedule" and not r.parallel]
    runs = [build(recipe) for recipe in (recipes[:QUICK] if quick else recipes)]
    learnt = [run for run in runs[::2] if run.recipe.micro_batches == 1]
    for run in runs:
        for _ in range(WARM_UP):
            run.step()
        run.steps_s.clear()
    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        for run in runs:
            run.step()
            if run in learnt:
                run.profile()
    table = learn_table(
        "this machine",
        plait.clusters.cpu().device,
        [
            MeasuredSteps(schedule=r.schedule, timelines=r.timelines, steps_s=r.steps_s)
            for r in learnt
        ],
    )
    return compare(runs, learnt, table)


def build(recipe: Recipe) -> Run:
    """Compile, and make a model."""
    schedule = make_schedule(recipe)
    model, tokens_BT = make_model(recipe), make_tokens(recipe)
    return Run(recipe, schedule, model, tokens_BT, make_optimizer(recipe, model))


def compare(runs: list[Run], learnt: list[Run], table: Table) -> list[Row]:
    """Errors of all runs, and of those that the table has not seen."""
    errors: dict[str, list[float]] = {"seen": [], "unseen": []}
    rows: list[Row] = []
    predicted_s, measured_s = [], []
    num_outside = 0
    for run in runs:
        price = plait.price(run.schedule, plait.clusters.cpu(), table=table, fragments=False)
        truth_s = statistics.median(run.steps_s)
        error = abs(price.step_s / truth_s - 1) * 100
        errors["seen" if run in learnt else "unseen"].append(error)
        num_outside += not price.low_s <= truth_s <= price.high_s
        predicted_s.append(price.step_s)
        measured_s.append(truth_s)
        print(_line(run, price, truth_s, run in learnt), flush=True)
        rows.append(_row(f"{run.recipe.name}: step time, error", "%", None, [error]))
    every = [*errors["seen"], *errors["unseen"]]
    count = f"{len(runs)} configurations, {len(errors['unseen'])} not profiled"
    return [
        _row(f"step time on one core, median error, {count}", "%", 7.0, every),
        _row("step time on one core, worst error", "%", 15.0, [max(every)]),
        _row("step time, median error of those not profiled", "%", 7.0, errors["unseen"]),
        Row(
            claim="step time, ranking: Kendall's tau",
            unit="",
            target=0.9,
            better="higher",
            samples=[kendall_tau(predicted_s, measured_s)],
        ),
        _row("step times outside of their interval", "of all", 0.1, [num_outside / len(runs)]),
        *rows,
    ]


def kendall_tau(first: list[float], second: list[float]) -> float:
    """Pairs in the same order less pairs in the other, over all pairs [Kendall 1938]."""
    signs = [
        1 if (a - b) * (c - d) > 0 else -1
        for (a, c), (b, d) in combinations(zip(first, second, strict=True), 2)
    ]
    return sum(signs) / len(signs)


def _line(run: Run, price: Price, truth_s: float, seen: bool) -> str:
    spread = (max(run.steps_s) / min(run.steps_s) - 1) * 100
    total = sum(share.num_operators for share in price.sources.values())
    known = price.sources[Source.MEASURED].num_operators
    return (
        f"  {run.recipe.name:34} {truth_s * 1e3:9.2f} ms, predicted {price.step_s * 1e3:9.2f} "
        f"[{price.low_s * 1e3:.2f}, {price.high_s * 1e3:.2f}], "
        f"error {(price.step_s / truth_s - 1) * 100:+.1f} %, spread {spread:.0f} %, "
        f"{(1 - known / max(total, 1)) * 100:.0f} % unseen{', profiled' if seen else ''}"
    )


def _row(claim: str, unit: str, target: float | None, samples: list[float]) -> Row:
    return Row(claim=claim, unit=unit, target=target, better="lower", samples=samples)


if __name__ == "__main__":
    run_benchmark("dryrun_time", measure)
