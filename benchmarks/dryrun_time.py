"""How far the dry run's step time is from the truth, on one core and on two ranks of this machine.

Every recipe of `dryrun_recipes` that a schedule of level O0 runs, and others (`dryrun_time_runs`).
Eager runs (FSDP2, DTensor, PyTorch's pipelining) have no price in time: no schedule runs them.

Steps that nobody observes are timed in turns with profiled ones and with messages, so that all see
the same machine; each program runs once before, as in a training, where its memory is at hand.
Tables are learnt from the profiles as `plait calibrate` does:

- one of one core, without half of all pairs of operator and forms, drawn at random: of each
  operator and dtype half of its forms; asked for all configurations of one rank, and again with
  other draws, and with one that leaves operators without any form (bfloat16's attention, say);
- one of two ranks, without the same half, from configurations that are not compared; asked for
  those of two ranks, whose messages take what they took alone, as in nccl-tests, and what the
  table learnt that they take beside;
- one that has seen every other configuration of one core only, all forms and operators of the
  others unseen.

With --device cuda, see `dryrun_time_gpu.py`.

Truth is the median step. On one core it is a ratio to calibration: fixed work is timed between all
steps, and each step and each profile are divided by what that took beside them (`Speed`). Steps of
two ranks are as the clock says. Printed beside each error: the spread of single steps by the clock,
and the interval.
"""

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import plait
from benchmarks.dryrun_ranking import PlanRanking, kendall_tau, rank_plans
from benchmarks.dryrun_time_ranks import NUM_RANKS, Ranks
from benchmarks.dryrun_time_runs import (
    SEEN_BY_RANKS,
    Run,
    Speed,
    build,
    on_one_core,
    on_two_ranks,
    run_of,
)
from benchmarks.result import Row, run_levels
from plait.cost.accelerators import find_cluster
from plait.cost.clusters import Device
from plait.cost.nccl_tests import Measured
from plait.cost.operations import Kind
from plait.cost.table import Source, Table
from plait.dryrun.learn import MeasuredSteps, launched_in_a_step, learn_table
from plait.dryrun.price import Price
from plait.ops.numerics import bfloat16_pays

ROUNDS, QUICK_ROUNDS = 16, 4
QUICK, QUICK_ON_RANKS, QUICK_SEEN = 4, 1, 2
SEED = 0
MORE_SEEDS = range(1, 5)
TIME_LIMIT_S = 270  # of the rounds: the machine is taken from others meanwhile


def measure(quick: bool) -> list[Row]:
    """Learn tables in turns with the truth, and compare all configurations with them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    recipes = on_one_core(has_bfloat16=bfloat16_pays("cpu"))
    alone = [run_of(recipe) for recipe in recipes[: QUICK if quick else None]]
    ranked = [run_of(recipe) for recipe in on_two_ranks()[: QUICK_ON_RANKS if quick else None]]
    seen = [run_of(recipe) for recipe in SEEN_BY_RANKS[: QUICK_SEEN if quick else None]]
    measured = measure_in_turns(alone, ranked, seen, QUICK_ROUNDS if quick else ROUNDS)
    pairs = pairs_of([*alone, *ranked])
    hidden = half_of_each_operator(pairs, SEED)
    print("on one core, half of the pairs of operator and forms unseen", flush=True)
    on_core = compare(alone, learn(alone, hidden))
    print("on two ranks, the same pairs unseen", flush=True)
    on_ranks = compare(ranked, learn(seen, hidden, measured), measured)
    print("on one core, every other configuration unseen", flush=True)
    others = compare(alone[1::2], learn(alone[::2]))
    print("on one core, other halves unseen", flush=True)
    drawn = [worst_error(alone, half_of_each_operator(pairs, seed)) for seed in MORE_SEEDS]
    blind = worst_error(alone, half_of_all(pairs, SEED))
    both = on_core.and_of(on_ranks)
    unseen = f"half of {len(pairs)} pairs unseen"
    runs = [*alone, *ranked]
    plans = rank_plans(
        [run.recipe for run in runs], [run.steps_s for run in runs], both.predicted_s
    )
    return [
        *both.rows(f"step time, {len(runs)} configurations, {unseen}"),
        *_plan_rows(plans),
        *on_core.rows(f"step time on one core, {len(alone)} configurations, {unseen}"),
        *on_ranks.rows(f"step time of two ranks, {len(ranked)} configurations, {unseen}"),
        *others.rows(f"step time on one core, {len(alone[1::2])} configurations, never profiled"),
        _row("step time on one core, other halves: worst error of each draw", "%", 15.0, drawn),
        _row("step time on one core, a half with whole operators: worst error", "%", None, [blind]),
        _row(
            "step times, spread of single steps (10th to 90th percentile over median)",
            "%",
            None,
            [run.spread * 100 for run in runs],
        ),
        *(
            _row(f"{run.recipe.name}: step time, error", "%", None, [abs(error) * 100])
            for run, error in zip(runs, both.errors, strict=True)
        ),
    ]


def measure_in_turns(
    alone: Sequence[Run], ranked: Sequence[Run], seen: Sequence[Run], num_rounds: int
) -> list[Measured]:
    """Time and profile every run, round by round; the messages between two ranks."""
    with Ranks(ranked, seen) as ranks:
        programs = [build(run.recipe, run.schedule) for run in alone]
        speed = Speed()
        start_s = time.perf_counter()
        for _ in range(num_rounds):
            speed.probe()
            for run, program in zip(alone, programs, strict=True):
                speed.measure(run, program)
            ranks.round()
            if time.perf_counter() - start_s > TIME_LIMIT_S:
                break
        print(
            f"  {len(alone[0].steps_s)} rounds in {time.perf_counter() - start_s:.0f} s", flush=True
        )
        speed.level(alone)
        fast, *_, slow = statistics.quantiles(speed.all_s, n=10)
        print(f"  the core's speed varied by {(slow / fast - 1) * 100:.0f} %", flush=True)
        return ranks.measured()


def pairs_of(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """Keys of all operators on their forms that take time, with operator and dtype."""
    return {
        each.outcome.key: (each.outcome.target, str(each.outcome.cost.dtype))
        for run in runs
        for each in launched_in_a_step(run.schedule)
        if each.outcome.cost is not None and each.outcome.cost.kind is not Kind.FREE
    }


def half_of_each_operator(pairs: Mapping[str, tuple[str, str]], seed: int) -> frozenset[str]:
    """Half of the forms of each operator and dtype, at random.

    One form of an operator stays; a half that is not whole is made up for by the next operators.
    """
    forms: dict[tuple[str, str], list[str]] = {}
    for key in sorted(pairs):
        forms.setdefault(pairs[key], []).append(key)
    generator = random.Random(seed)
    chosen: list[str] = []
    owed = 0
    for name in sorted(forms):
        count = min((len(forms[name]) + owed) // 2, len(forms[name]) - 1)
        owed += len(forms[name]) - 2 * count
        chosen += generator.sample(forms[name], count)
    return frozenset(chosen)


def half_of_all(pairs: Mapping[str, tuple[str, str]], seed: int) -> frozenset[str]:
    """Half of all keys, at random."""
    return frozenset(random.Random(seed).sample(sorted(pairs), len(pairs) // 2))


def worst_error(runs: Sequence[Run], hidden: frozenset[str]) -> float:
    """The largest error in percent of a table without these keys, which is printed."""
    compared = compare(runs, learn(runs, hidden), say=False)
    errors = [abs(error) * 100 for error in compared.errors]
    i = errors.index(max(errors))
    print(
        f"  {len(hidden)} unseen: median error {statistics.median(errors):.1f} %, "
        f"worst {errors[i]:.1f} % ({runs[i].recipe.name})",
        flush=True,
    )
    return errors[i]


def learn(
    runs: Sequence[Run],
    without: frozenset[str] = frozenset(),
    messages: Sequence[Measured] = (),
    device: Device | None = None,
) -> Table:
    """A table of this machine from profiled runs.

    messages: of two ranks, which the runs are of. device: a GPU; by default this CPU.
    """
    measured = [
        MeasuredSteps(schedule=r.schedule, timelines=r.timelines, steps_s=r.steps_s) for r in runs
    ]
    cluster = plait.clusters.cpu(NUM_RANKS) if messages else None
    return learn_table(
        "this machine",
        device or plait.clusters.cpu().device,
        measured,
        without=without,
        cluster=cluster,
        messages=messages,
    )


@dataclass(frozen=True)
class Comparison:
    """Times in the order of the runs, and for each whether it lies outside of its interval.

    single_outside: the share of its single steps that do.
    """

    predicted_s: list[float]
    measured_s: list[float]
    outside: list[bool]
    single_outside: list[float]

    @property
    def errors(self) -> list[float]:
        """Relative to the truth."""
        pairs = zip(self.predicted_s, self.measured_s, strict=True)
        return [predicted_s / measured_s - 1 for predicted_s, measured_s in pairs]

    def and_of(self, other: "Comparison") -> "Comparison":
        """Both, one behind the other."""
        return Comparison(
            self.predicted_s + other.predicted_s,
            self.measured_s + other.measured_s,
            self.outside + other.outside,
            self.single_outside + other.single_outside,
        )

    def rows(self, title: str, *, median: float = 7.0, worst: float = 15.0) -> list[Row]:
        """The claims of one table. median, worst: targets of its errors, in percent."""
        percent = [abs(error) * 100 for error in self.errors]
        shares = [statistics.mean(each) for each in (self.outside, self.single_outside)]
        return [
            _row(f"{title}: median error", "%", median, percent),
            _row(f"{title}: worst error", "%", worst, [max(percent)]),
            *self._ranking(title),
            _row(f"{title}: median step outside of the interval", "of all", 0.1, [shares[0]]),
            _row(f"{title}: single steps outside", "of all", 0.2, [shares[1]]),
        ]

    def _ranking(self, title: str) -> list[Row]:
        if len(self.errors) < 2:
            return []
        return [_tau(title, kendall_tau(self.predicted_s, self.measured_s))]


def compare(
    runs: Sequence[Run],
    table: Table,
    measured: Sequence[Measured] = (),
    *,
    say: bool = True,
    cluster: str = "cpu",
) -> Comparison:
    """Price each run by a table. say: print it beside the truth."""
    prices = [
        plait.price(
            run.schedule,
            find_cluster(cluster, run.recipe.ranks),
            table=table,
            measured=measured,
            fragments=False,
        )
        for run in runs
    ]
    truths_s = [statistics.median(run.steps_s) for run in runs]
    if say:
        for run, price, truth_s in zip(runs, prices, truths_s, strict=True):
            print(_line(run, price, truth_s), flush=True)
    return Comparison(
        predicted_s=[price.step_s for price in prices],
        measured_s=truths_s,
        outside=[_is_outside(p, t) for p, t in zip(prices, truths_s, strict=True)],
        single_outside=[
            statistics.mean(_is_outside(price, step_s) for step_s in run.steps_s)
            for run, price in zip(runs, prices, strict=True)
        ],
    )


def _is_outside(price: Price, step_s: float) -> bool:
    return not price.low_s <= step_s <= price.high_s


def _line(run: Run, price: Price, truth_s: float) -> str:
    total_s = sum(share.seconds for share in price.sources.values())
    known_s = price.sources[Source.MEASURED].seconds
    return (
        f"  {run.recipe.name:34} {truth_s * 1e3:9.2f} ms, predicted {price.step_s * 1e3:9.2f} "
        f"[{price.low_s * 1e3:.2f}, {price.high_s * 1e3:.2f}], "
        f"error {(price.step_s / truth_s - 1) * 100:+.1f} %, spread {run.spread * 100:.0f} %, "
        f"messages {price.communication_s * 1e3:.2f} ms, "
        f"{(1 - known_s / total_s) * 100:.0f} % of the time of operators that were not measured"
    )


def _on_gpu(quick: bool) -> list[Row]:
    from benchmarks import dryrun_time_gpu  # it needs this module

    return dryrun_time_gpu.measure(quick)


def _plan_rows(plans: PlanRanking) -> list[Row]:
    """No row where no two plans are told apart, as of few rounds."""
    if not plans.told_apart:
        return []
    told = f"{plans.told_apart} of {plans.num_pairs} pairs that steps tell apart"
    return [_tau(f"plans of one model on one batch, {told}", plans.tau)]


def _tau(title: str, tau: float) -> Row:
    claim = f"{title}: ranking, Kendall's tau"
    return Row(claim=claim, unit="", target=0.9, better="higher", samples=[tau])


def _row(claim: str, unit: str, target: float | None, samples: list[float]) -> Row:
    return Row(claim=claim, unit=unit, target=target, better="lower", samples=samples)


if __name__ == "__main__":
    run_levels("dryrun_time", {"cpu": measure, "cuda": _on_gpu}, "device")
