"""How far the dry run's step time is from the truth, on one core of this machine.

The recipes of `dryrun_recipes` that one rank runs by a schedule, in float32 (a CPU without bfloat16
units emulates its products, 8 to 20 times slower, which no recipe would choose). Steps that nobody
observes are timed in turns with profiled ones, so that both see the same machine. Two tables are
learnt from the profiles as `plait calibrate` does, and asked for all configurations:

- one without half of all pairs of operator and forms, drawn at random;
- one that has seen every other configuration only, all forms and operators of the others unseen.

Truth is the median step. Printed beside each error: the spread of single steps and the interval.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from plait.cost.operations import Kind
from plait.cost.table import Source, Table
from plait.cost.timeline import Timeline
from plait.dryrun.learn import MeasuredSteps, launched_in_a_step, learn_table
from plait.dryrun.price import Price
from plait.executor.profile import profile_step
from plait.graph.schedule import Schedule

WARM_UP, ROUNDS, QUICK_ROUNDS = 2, 30, 5
QUICK = 5
SEED = 0
TIME_LIMIT_S = 400  # of the rounds: the machine is taken from others meanwhile


@dataclass(eq=False)
class Run:
    """A recipe on real tensors, and what was measured of it."""

    recipe: Recipe
    schedule: Schedule
    model: Any
    tokens_BT: torch.Tensor
    optimizer: Any
    steps_s: list[float] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)

    @property
    def spread(self) -> float:
        """From the 10th to the 90th percentile of single steps, over their median."""
        tenths = statistics.quantiles(self.steps_s, n=10)
        return (tenths[-1] - tenths[0]) / statistics.median(self.steps_s)

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
    """Learn two tables in turns with the truth, and compare all configurations with each."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipes = configurations()[: QUICK if quick else None]
    runs = [build(recipe) for recipe in recipes]
    for run in runs:
        for _ in range(WARM_UP):
            run.step()
        run.steps_s.clear()
    start_s = time.perf_counter()
    for _ in range(QUICK_ROUNDS if quick else ROUNDS):
        for run in runs:
            run.step()
            run.profile()
        if time.perf_counter() - start_s > TIME_LIMIT_S:
            break
    print(f"  {len(runs[0].steps_s)} rounds", flush=True)
    hidden = half_of_pairs(runs)
    print("half of the pairs of operator and forms unseen", flush=True)
    by_pair = compare(runs, learn(runs, hidden))
    print("every other configuration unseen", flush=True)
    seen = runs[::2]
    by_configuration = compare([run for run in runs if run not in seen], learn(seen))
    return [
        *by_pair.rows(f"half of {2 * len(hidden)} pairs unseen", len(runs)),
        *by_configuration.rows("never profiled", len(runs) - len(seen)),
        _row(
            "step times, spread of single steps (10th to 90th percentile over median)",
            "%",
            None,
            [run.spread * 100 for run in runs],
        ),
        *(
            _row(f"{run.recipe.name}: step time, error", "%", None, [abs(error) * 100])
            for run, error in zip(runs, by_pair.errors, strict=True)
        ),
    ]


def configurations() -> list[Recipe]:
    """One rank, a schedule, float32; each once."""
    found: list[Recipe] = []
    for recipe in RECIPES.values():
        if recipe.way != "schedule" or recipe.parallel:
            continue
        if recipe.dtype is not torch.float32:
            name = recipe.name.replace("bfloat16", "float32")
            recipe = replace(recipe, dtype=torch.float32, name=name)
        if all(recipe.name != each.name for each in found):
            found.append(recipe)
    return found


def half_of_pairs(runs: Sequence[Run]) -> frozenset[str]:
    """Keys of half of all operators on their forms that take time, at random."""
    keys = {
        each.outcome.key
        for run in runs
        for each in launched_in_a_step(run.schedule)
        if each.outcome.cost is not None and each.outcome.cost.kind is not Kind.FREE
    }
    return frozenset(random.Random(SEED).sample(sorted(keys), len(keys) // 2))


def learn(runs: Sequence[Run], without: frozenset[str] = frozenset()) -> Table:
    """A table of this machine from profiled runs."""
    measured = [
        MeasuredSteps(schedule=r.schedule, timelines=r.timelines, steps_s=r.steps_s) for r in runs
    ]
    return learn_table("this machine", plait.clusters.cpu().device, measured, without=without)


def build(recipe: Recipe) -> Run:
    """Compile, and make a model."""
    schedule = make_schedule(recipe)
    model, tokens_BT = make_model(recipe), make_tokens(recipe)
    return Run(recipe, schedule, model, tokens_BT, make_optimizer(recipe, model))


@dataclass(frozen=True)
class Comparison:
    """Relative errors in the order of the runs, times, and what lies outside of its interval."""

    errors: list[float]
    predicted_s: list[float]
    measured_s: list[float]
    outside: float
    single_outside: float

    def rows(self, what: str, count: int) -> list[Row]:
        """The claims of one table."""
        percent = [abs(error) * 100 for error in self.errors]
        title = f"step time on one core, {count} configurations, {what}"
        return [
            _row(f"{title}: median error", "%", 7.0, percent),
            _row(f"{title}: worst error", "%", 15.0, [max(percent)]),
            Row(
                claim=f"{title}: ranking, Kendall's tau",
                unit="",
                target=0.9,
                better="higher",
                samples=[kendall_tau(self.predicted_s, self.measured_s)],
            ),
            _row(f"{title}: median step outside of the interval", "of all", 0.1, [self.outside]),
            _row(f"{title}: single steps outside", "of all", 0.2, [self.single_outside]),
        ]


def compare(runs: Sequence[Run], table: Table) -> Comparison:
    """Price each run by a table, and print it beside the truth."""
    prices = [
        plait.price(run.schedule, plait.clusters.cpu(), table=table, fragments=False)
        for run in runs
    ]
    truths_s = [statistics.median(run.steps_s) for run in runs]
    for run, price, truth_s in zip(runs, prices, truths_s, strict=True):
        print(_line(run, price, truth_s), flush=True)
    inside = [p.low_s <= t <= p.high_s for p, t in zip(prices, truths_s, strict=True)]
    singles = [
        price.low_s <= step_s <= price.high_s
        for run, price in zip(runs, prices, strict=True)
        for step_s in run.steps_s
    ]
    return Comparison(
        errors=[p.step_s / t - 1 for p, t in zip(prices, truths_s, strict=True)],
        predicted_s=[price.step_s for price in prices],
        measured_s=truths_s,
        outside=1 - sum(inside) / len(inside),
        single_outside=1 - sum(singles) / len(singles),
    )


def kendall_tau(first: list[float], second: list[float]) -> float:
    """Pairs in the same order less pairs in the other, over all pairs [Kendall 1938]."""
    signs = [
        1 if (a - b) * (c - d) > 0 else -1
        for (a, c), (b, d) in combinations(zip(first, second, strict=True), 2)
    ]
    return sum(signs) / len(signs)


def _line(run: Run, price: Price, truth_s: float) -> str:
    total_s = sum(share.seconds for share in price.sources.values())
    known_s = price.sources[Source.MEASURED].seconds
    return (
        f"  {run.recipe.name:34} {truth_s * 1e3:9.2f} ms, predicted {price.step_s * 1e3:9.2f} "
        f"[{price.low_s * 1e3:.2f}, {price.high_s * 1e3:.2f}], "
        f"error {(price.step_s / truth_s - 1) * 100:+.1f} %, spread {run.spread * 100:.0f} %, "
        f"{(1 - known_s / total_s) * 100:.0f} % of the time of operators that were not measured"
    )


def _row(claim: str, unit: str, target: float | None, samples: list[float]) -> Row:
    return Row(claim=claim, unit=unit, target=target, better="lower", samples=samples)


if __name__ == "__main__":
    run_benchmark("dryrun_time", measure)
