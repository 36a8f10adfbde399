"""The paper machine: what share of tensor-parallel communication is hidden, by arithmetic.

Llama shapes on H200s, tensor parallel over 8 ranks, 8,192 local tokens, for a forward and for a
backward of all layers:

    net hidden = (T0 - To) / (T0 - Tn)

with T0 unsplit and waiting at once, To split and ordered, Tn unsplit with free communication. A
split makes products with fewer rows, which are less efficient: To pays for that. With interference
no order can win more than 1 / 1.19 = 0.84. Nothing here is measured.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from benchmarks.overlap_layers import (
    LLAMA_70B,
    LLAMA_405B,
    PaperTimes,
    Program,
    Shape,
    Split,
    Times,
    backward,
    forward,
)
from benchmarks.result import Row, run_benchmark
from plait.cost.clusters import Link, h200
from plait.cost.simulate import COMPUTE, Simulation, list_schedule

BANDWIDTHS = (350e9, 200e9)
LATENCY_S = 5e-6
INTERFERENCE = 1.19  # overlapped compute takes so much longer on average [arXiv 2507.03114]
PINNED_LIMIT_BYTES = 2 << 30  # operands of weight gradients that wait: those of two or three layers
SKEWS = (0.0, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 6.0)
GRAIN = 256  # tokens; parts are multiples
_SEARCH_LAYERS = (12, 4)
TARGETS = {"forward": 0.85, "forward, causal split": 0.95, "backward": 0.98}

Build = Callable[[Shape, Times, Split], Program]


@dataclass(frozen=True, kw_only=True)
class Priced:
    """One way to run one direction of all layers, with the times that its share is made of."""

    split: Split
    skew: float
    unsplit_s: float  # T0
    ordered_s: float  # To
    free_s: float  # Tn
    compute_s: float  # of the split

    @property
    def net_hidden(self) -> float:
        """Share of the communication time that the order wins, net of what the split costs."""
        return (self.unsplit_s - self.ordered_s) / (self.unsplit_s - self.free_s)

    @property
    def split_penalty(self) -> float:
        """What the split adds to compute, as a share of the communication time."""
        return (self.compute_s - self.free_s) / (self.unsplit_s - self.free_s)

    @property
    def communication_to_compute(self) -> float:
        """Of the unsplit program."""
        return (self.unsplit_s - self.free_s) / self.free_s


def price(
    build: Build, shape: Shape, times: Times, split: Split, *, slowdown: float = 1.0
) -> Priced:
    """Order one split with the best skew."""
    unsplit = build(shape, times, Split((sum(split.sizes),)))
    free_s = sum(each.duration_s for each in unsplit.operations if each.stream == COMPUTE)
    program = build(shape, times, split)
    skews = SKEWS if len(split.sizes) > 1 else SKEWS[:1]
    ordered, skew = min(
        ((ordering(program, skew, slowdown), skew) for skew in skews),
        key=lambda each: each[0].total_s,
    )
    return Priced(
        split=split,
        skew=skew,
        unsplit_s=sum(each.duration_s for each in unsplit.operations),
        ordered_s=ordered.total_s,
        free_s=free_s,
        compute_s=ordered.compute_s,
    )


def ordering(program: Program, skew: float, slowdown: float = 1.0) -> Simulation:
    """Order a program: position in the model, later replicas later by the skew, filler last."""
    return list_schedule(
        program.operations,
        program.priorities(skew),
        pinned_limit_bytes=PINNED_LIMIT_BYTES,
        slowdown=slowdown,
    )


def search(
    build: Build, shape: Shape, times: Times, *, is_causal: bool, max_replicas: int = 4
) -> Priced:
    """Find the split that hides most: parts, and what the MLP takes together.

    Every way to join equal parts is tried; then tokens move between neighbours as long as that
    helps. Judged by the time of eight layers amid others, and in the end, beside the equal parts,
    by that of the whole. Greedy, so the best of what it saw.
    """

    def layers_s(split: Split) -> float:
        long, short = [build(replace(shape, num_layers=n), times, split) for n in _SEARCH_LAYERS]
        return min(ordering(long, x).total_s - ordering(short, x).total_s for x in SKEWS)

    starts = list(_starts(shape, is_causal, max_replicas))
    time_s, best = min(((layers_s(split), split) for split in starts), key=lambda each: each[0])
    for step in (4 * GRAIN, 2 * GRAIN, GRAIN):
        while moved := [(layers_s(split), split) for split in _moves(best, step)]:
            better_s, better = min(moved, key=lambda each: each[0])
            if better_s >= time_s:
                break
            time_s, best = better_s, better
    finals = [best, *(split for split in starts if not split.joined)]
    return min((price(build, shape, times, x) for x in finals), key=lambda each: each.ordered_s)


def equal_parts(num_tokens: int, num_replicas: int) -> tuple[int, ...]:
    """Parts of near equal size, multiples of the grain, larger ones first."""
    grains, rest = divmod(num_tokens // GRAIN, num_replicas)
    return tuple(GRAIN * (grains + (j < rest)) for j in range(num_replicas))


def _starts(shape: Shape, is_causal: bool, max_replicas: int) -> Iterator[Split]:
    for num_replicas in range(1, max_replicas + 1):
        sizes = equal_parts(shape.num_tokens, num_replicas)
        for joined in _compositions(num_replicas):
            yield Split(sizes, joined if max(joined) > 1 else (), is_causal)


def _compositions(total: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a sum, order counting."""
    if not total:
        yield ()
    for first in range(1, total + 1):
        for rest in _compositions(total - first):
            yield (first, *rest)


def _moves(split: Split, step: int) -> Iterator[Split]:
    for i, j in pairwise(range(len(split.sizes))):
        for source, sink in ((i, j), (j, i)):
            sizes = list(split.sizes)
            sizes[source] -= step
            sizes[sink] += step
            if sizes[source] >= GRAIN:
                yield replace(split, sizes=tuple(sizes))


def measure(quick: bool) -> list[Row]:
    """Price every shape, bandwidth and direction; quick: only the smaller shape and faster link."""
    rows: list[Row] = []
    for shape in (LLAMA_70B,) if quick else (LLAMA_70B, LLAMA_405B):
        for bandwidth in BANDWIDTHS[:1] if quick else BANDWIDTHS:
            link = Link(latency_s=LATENCY_S, bandwidth_bytes_per_s=bandwidth)
            times = PaperTimes(shape, h200(shape.tp).device, link)
            for direction in TARGETS:
                rows += _rows(direction, shape, times, bandwidth)
    return rows


def _rows(direction: str, shape: Shape, times: Times, bandwidth: float) -> list[Row]:
    build = backward if direction == "backward" else forward
    is_causal = "causal" in direction
    sizes = [equal_parts(shape.num_tokens, n) for n in (1, 2, 3, 4)]
    splits = [Split(each, (), is_causal) for each in sizes]
    best = search(build, shape, times, is_causal=is_causal)
    slowed = min(
        (
            price(build, shape, times, split, slowdown=INTERFERENCE)
            for split in (*splits, best.split)
        ),
        key=lambda each: each.ordered_s,
    )
    where = (
        f"paper: {shape.name}, {bandwidth / 1e9:.0f} GB/s, {direction}, "
        f"communication/compute {best.communication_to_compute:.2f}"
    )
    target = TARGETS[direction] if bandwidth == BANDWIDTHS[0] else None
    penalty = f"split penalty of that: {best.split}, skew {best.skew:g}"
    return [
        _row(f"{where}: net hidden, R <= 4", best.net_hidden, target),
        _row(f"{where}: {penalty}", best.split_penalty, None, better="lower"),
        *(
            _row(
                f"{where}: net hidden, R = {len(split.sizes)}, equal parts",
                price(build, shape, times, split).net_hidden,
                None,
            )
            for split in splits
        ),
        _row(
            f"{where}: net hidden, R <= 4, compute beside messages x {INTERFERENCE}",
            slowed.net_hidden,
            None,
        ),
    ]


def _row(
    claim: str,
    value: float,
    target: float | None,
    *,
    better: Literal["higher", "lower"] = "higher",
) -> Row:
    return Row(claim=claim, unit="", target=target, better=better, samples=[round(value, 6) + 0.0])


if __name__ == "__main__":
    run_benchmark("overlap_price", measure)
