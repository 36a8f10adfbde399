"""What replicas hide at levels O1 and O2, beside O0: the order must survive fusion.

As in `overlap.py`, at ratio 0.5 on the token axis; each level has a link whose messages take half
of its own free step. The levels take turns in one run. The figure is the difference between the
best number of replicas of the level and the best of O0, round by round.
"""

import gc
import statistics
from dataclasses import replace

from benchmarks.overlap import TP, WIDTHS, Bench, Size, begin, dtypes, row, say
from benchmarks.result import Row
from plait.compiler.compile import compile
from plait.executor.delayed_process_group import DelayedProcessGroup, registered
from plait.executor.measure_overlap import link_for
from plait.executor.overlap_forms import DIRECTIONS
from plait.executor.run import Runnable
from plait.executor.timed_rounds import Samples, Step, measure_rounds, net_hidden, with_twin
from plait.plan.parallel_plan import ParallelPlan

RATIO = 0.5
REPLICAS = (2, 3, 4)


def measure_level(level: str, quick: bool, size: Size, num_rounds: int) -> list[Row]:
    """Net hidden of both levels and their difference, by dtype and direction."""
    group, size, num_rounds = begin(quick, size, num_rounds)
    rows: list[Row] = []
    for kind, dtype in dtypes().items():
        if kind == "bf16" and quick:
            continue
        if not quick:
            size = replace(size, width=WIDTHS[kind])
        name = f"{kind}, {size.tokens} tokens, ratio {RATIO:g}, token axis"
        say(name)
        samples = _samples(level, Bench(size, dtype, group, num_rounds))
        rows += _rows(name, level, samples, quick)
        gc.collect()
    return rows


def _samples(level: str, bench: Bench) -> Samples:
    programs: dict[str, Step] = {}
    graph = bench.graphs[False]
    with registered({"tp": bench.group}):
        for each in ("O0", level):
            unsplit = bench.step(Runnable(compile(graph, ParallelPlan(), level=each)))
            link = link_for(bench.group, _free_s(unsplit, bench.group), RATIO)
            programs |= with_twin(f"{each} unsplit", unsplit, bench.group, link)
            for number in REPLICAS:
                plan = ParallelPlan(tp=TP, replicas=number)
                schedule = compile(graph, plan, level=each, cluster=bench.on_link(link))
                step = bench.step(Runnable(schedule))
                name = f"{each} {number}"
                programs[name] = with_twin(name, step, bench.group, link)[name]
        return measure_rounds(programs, bench.num_rounds)


def _free_s(step: Step, group: DelayedProcessGroup) -> float:
    group.scale = 0.0
    step()
    found: list[float] = []
    for _ in range(3):
        group.transfers.clear()
        found.append(sum(step().values()))
    return statistics.median(found)


def _rows(name: str, level: str, samples: Samples, quick: bool) -> list[Row]:
    rows: list[Row] = []
    for direction in DIRECTIONS:
        best: dict[str, list[float]] = {}
        for each in ("O0", level):
            found = {
                number: net_hidden(samples, f"{each} unsplit", f"{each} {number}", direction)
                for number in REPLICAS
            }
            number = max(found, key=lambda n: statistics.median(found[n]))
            best[each] = found[number]
            title = f"{name}: {direction} net hidden at {each}, R <= 4 (R = {number})"
            rows.append(row(title, "", best[each], quick))
        lost = [mine - theirs for mine, theirs in zip(best[level], best["O0"], strict=True)]
        rows.append(row(f"{name}: {direction} net hidden, {level} - O0", "", lost, quick, -0.02))
        seconds = {each: samples.of(f"{each} unsplit free", direction) for each in ("O0", level)}
        ratios = [mine / theirs for mine, theirs in zip(seconds[level], seconds["O0"], strict=True)]
        title = f"{name}: {direction}, unsplit and free, {level} / O0"
        rows.append(row(title, "x", ratios, quick, better="lower"))
    return rows
