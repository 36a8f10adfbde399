"""A local batch of several samples: replicas of its samples beside a batch split written by hand.

As in `overlap.py`, at ratio 0.5, the batch axis. The rival is `overlap_rivals.HalfBatches`. The two
are within some percent of each other, so there are more rounds.
"""

import gc
from dataclasses import replace

import torch

from benchmarks.overlap import (
    RATIOS,
    REPLICAS,
    TP,
    WIDTHS,
    Bench,
    Hiding,
    Size,
    against,
    begin,
    dtypes,
    hiding_rows,
    name_of,
    say,
)
from benchmarks.overlap_rivals import HalfBatches
from benchmarks.result import Row
from plait.executor.delayed_process_group import DelayedProcessGroup, registered
from plait.executor.run import Runnable
from plait.executor.timed_rounds import FREE, measure_rounds, with_twin

BATCHES = (2, 4)


def measure_batches(quick: bool, size: Size, num_rounds: int) -> list[Row]:
    """Steps of both, and what replicas hide, by dtype and local batch."""
    group, size, num_rounds = begin(quick, size, num_rounds)
    rows: list[Row] = []
    for kind, dtype in list(dtypes().items())[: 1 if quick else 2]:
        width = size.width if quick else WIDTHS[kind]
        for batch in BATCHES[: 1 if quick else 2]:
            where = f"{kind}, {size.tokens} tokens, ratio {RATIOS[0]:g}, local batch {batch}"
            say(where)
            each = replace(size, width=width, batch=batch, tokens=size.tokens // batch)
            rows += _rows(where, each, dtype, group, num_rounds, quick)
            gc.collect()
    return rows


def _rows(
    where: str,
    size: Size,
    dtype: torch.dtype,
    group: DelayedProcessGroup,
    num_rounds: int,
    quick: bool,
) -> list[Row]:
    bench = Bench(size, dtype, group, num_rounds)
    link = bench.link_of[RATIOS[0]]
    halves = HalfBatches(size.config, TP, dtype, size.drawn())
    programs = with_twin("unsplit", bench.unsplit, group, link)
    programs |= with_twin("Domino", lambda: halves.step(group), group, link)
    forms = bench.forms(RATIOS[0], "batch", tuple(n for n in REPLICAS if n <= size.batch))
    for each in forms:
        name = name_of(each.num_replicas)
        programs[name] = with_twin(name, bench.step(Runnable(each.overlapped)), group, link)[name]
        if each.num_replicas > 1:
            split = f"split {each.num_replicas}"
            twin = with_twin(split, bench.step(Runnable(each.split)), group, link)
            programs[split + FREE] = twin[split + FREE]
    with registered({"tp": group}):
        hiding = Hiding(forms, measure_rounds(programs, num_rounds))
    best, free = hiding.best_of_step(), ("Domino" + FREE, "unsplit" + FREE)
    return [
        against(
            f"{where}: step of half batches by hand / ours (R = {best})",
            hiding.samples, "Domino", name_of(best), quick, 1.0, "higher",
        ),
        against(f"{where}: half batches by hand / T0, free", hiding.samples, *free, quick, None,
                "lower"),
        *hiding_rows(where, hiding, quick),
    ]  # fmt: skip
