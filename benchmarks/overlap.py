"""What share of tensor-parallel communication replicas hide, in wall clock, and who hides more.

A training step of a 4-layer Llama as rank 0 of 4 computes it, on one thread; messages take the time
of a link whose bandwidth makes them a given share of the free step, and whose latency is 5 % of
their mean time (`plait overlap` measures the same, once). Runs of a block take turns; net hidden is
that of each round. Memory that one step frees is kept for the next, on all sides, as on a GPU: what
the C library gives back costs a fault for each page, more for a program that holds more at a time.

    python -m benchmarks.overlap [--quick] [--rounds N] [--tokens N] [--width N] [--short]
    python -m benchmarks.overlap --batches      local batches above 1 (overlap_batches)
    python -m benchmarks.overlap --price        the paper machine instead (overlap_price)
    python -m benchmarks.overlap --level O1     what a level hides beside O0 (overlap_levels)

--short leaves out ratio 1, and rivals in bf16. Without units for bf16 nothing is measured in it.
The shorter the messages, the more a share of them scatters: of ratio 0.25 there are four times as
many rounds. --width is that of both dtypes (else WIDTHS says): a step takes one to three seconds.
"""

import argparse
import gc
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import overlap_price
from benchmarks.overlap_rivals import Placed, alone, aot_eager, compiled, forget
from benchmarks.result import Row, run_benchmark
from plait.cost.clusters import Cluster, Link
from plait.errors import PlanError
from plait.executor.delayed_process_group import DelayedProcessGroup, registered
from plait.executor.host_memory import keep_freed_memory
from plait.executor.measure_overlap import calibrated_cluster, link_for
from plait.executor.overlap_forms import DIRECTIONS, Forms, forms_of, prepared, unordered
from plait.executor.run import Runnable
from plait.executor.timed_rounds import (
    FREE,
    Samples,
    Step,
    example_inputs,
    measure_rounds,
    net_hidden,
    timed_step,
    with_twin,
)
from plait.graph.capture import capture
from plait.graph.graph import Graph
from plait.models.decoder import Decoder, DecoderConfig
from plait.ops.numerics import bfloat16_pays
from plait.plan.parallel_plan import ParallelPlan

TP = 4
RATIOS = (0.5, 0.25, 1.0)
TARGETS = {
    ("forward", 0.5): 0.70,
    ("backward", 0.5): 0.92,
    ("forward", 0.25): 0.80,
    ("backward", 0.25): 0.95,
}
CAUSAL_TARGETS = {("forward", 0.5): 0.85}
REPLICAS = (1, 2, 3, 4)
WIDTHS = {"fp32": 1024, "bf16": 2048}
"""With which a step takes at least a second: units for bfloat16 are several times as fast."""
ANY_LINK = Link(latency_s=0.0, bandwidth_bytes_per_s=1.0)
"""Of a group whose messages are not timed yet."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the model and its input. The vocabulary is small: layers are most of the step."""

    width: int = WIDTHS["fp32"]
    layers: int = 4
    batch: int = 1
    tokens: int = 2048

    @property
    def config(self) -> DecoderConfig:
        """A Llama of these sizes, in the proportions of Llama 3 8B but for fewer query heads."""
        return DecoderConfig(
            vocab_size=512,
            hidden_size=self.width,
            intermediate_size=self.width * 11 // 4,
            num_layers=self.layers,
            num_heads=self.width // 64,
            num_kv_heads=self.width // 128,
            head_size=64,
            max_positions=self.tokens,
        )

    def captured(self, dtype: torch.dtype, *, causal_split: bool = False) -> Graph:
        """The step of one rank, ready to be split; causal attention too, or not."""
        with torch.device("meta"):
            model = Decoder(self.config).to(dtype)
            tokens_BT = torch.empty((self.batch, self.tokens), dtype=torch.int64)
        plan = ParallelPlan(tp=TP, replicas="auto", causal_split=causal_split)
        return prepared(capture(model, tokens_BT, plan, loss=_loss))

    def drawn(self) -> Tensor:
        """Tokens."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 512, (self.batch, self.tokens), generator=generator)


def _loss(model: Decoder, tokens_BT: Tensor) -> Tensor:
    return model.loss(model(tokens_BT), tokens_BT) / tokens_BT.numel()


class Bench:
    """One size and dtype: its graph, its inputs, and what the cost model was fitted to."""

    def __init__(
        self, size: Size, dtype: torch.dtype, group: DelayedProcessGroup, num_rounds: int
    ) -> None:
        self.group, self.num_rounds = group, num_rounds
        # What is split decides how large the pieces are, so each has a graph of its own.
        self.graphs = {
            causal_split: size.captured(dtype, causal_split=causal_split)
            for causal_split in (False, True)
        }
        base = unordered(self.graphs[False])
        self.inputs = example_inputs(base, vocab_size=size.config.vocab_size)
        self.unsplit = self.step(Runnable(base))
        group.scale = 0.0
        with registered({"tp": group}):
            self.unsplit()
            free_s: list[float] = []
            for _ in range(3):
                group.transfers.clear()
                free_s.append(sum(self.unsplit().values()))
            self.free_s = statistics.median(free_s)
            self.link_of = {ratio: link_for(group, self.free_s, ratio) for ratio in RATIOS}
            self.cluster = calibrated_cluster(base, self.inputs, {"tp": ANY_LINK}, TP)

    def step(self, runnable: Runnable) -> Step:
        """A program of it."""
        return lambda: timed_step(runnable, self.inputs)

    def on(self, ratio: float) -> Cluster:
        """The cost model's machine, with the link of that ratio."""
        return self.on_link(self.link_of[ratio])

    def on_link(self, link: Link) -> Cluster:
        """The cost model's machine, with a link."""
        return replace(self.cluster, links={"tp": link})

    def rounds_of(self, ratio: float) -> int:
        """Rounds of a ratio: as many more as make medians of short messages as sure."""
        return max(self.num_rounds, round(self.num_rounds * (RATIOS[0] / ratio) ** 2))

    def forms(
        self,
        ratio: float,
        axis: str,
        replicas: tuple[int, ...] = REPLICAS,
        *,
        causal_split: bool = False,
    ) -> list[Forms]:
        """Each number of replicas that can be had."""
        found: list[Forms] = []
        how: dict[str, Any] = {"axis": axis, "causal_split": causal_split}
        for number in replicas:
            try:
                found.append(forms_of(self.graphs[causal_split], number, self.on(ratio), **how))
            except PlanError:
                if number == 1:
                    raise
        return found

    def hiding(self, ratio: float, axis: str, *, causal_split: bool = False) -> "Hiding":
        """Measure all numbers of replicas at a ratio."""
        forms = self.forms(ratio, axis, causal_split=causal_split)
        link = self.link_of[ratio]
        programs = with_twin("unsplit", self.unsplit, self.group, link)
        for each in forms:
            number = each.num_replicas
            ordered = self.step(Runnable(each.overlapped))
            split = self.step(Runnable(each.split))
            overlapped = with_twin(f"overlapped {number}", ordered, self.group, link)
            serial = with_twin(f"split {number}", split, self.group, link)
            programs[f"overlapped {number}"] = overlapped[f"overlapped {number}"]
            if number > 1:
                programs[f"split {number}{FREE}"] = serial[f"split {number}{FREE}"]
        with registered({"tp": self.group}):
            return Hiding(forms, measure_rounds(programs, self.rounds_of(ratio)))


@dataclass(frozen=True)
class Hiding:
    """What was measured at one ratio."""

    forms: list[Forms]
    samples: Samples

    def net(self, number: int, direction: str) -> list[float]:
        """Net hidden, round by round."""
        return net_hidden(self.samples, "unsplit", f"overlapped {number}", direction)

    def best(self, direction: str) -> int:
        """The number of replicas with the best median."""
        numbers = [each.num_replicas for each in self.forms]
        return max(numbers, key=lambda n: statistics.median(self.net(n, direction)))

    def best_of_step(self) -> int:
        """The number of replicas with which the step as a whole is shortest."""
        numbers = [each.num_replicas for each in self.forms]
        return min(numbers, key=lambda n: statistics.median(steps_of(self.samples, name_of(n))))

    def ratio(self, direction: str) -> list[float]:
        """Communication over compute of one direction, round by round."""
        return [
            whole_s / free_s - 1
            for whole_s, free_s in zip(
                self.samples.of("unsplit", direction),
                self.samples.of("unsplit" + FREE, direction),
                strict=True,
            )
        ]

    def penalty(self, number: int, direction: str) -> list[float]:
        """Split over unsplit, both with free communication, round by round."""
        if number == 1:
            return [1.0]
        return [
            split_s / free_s
            for split_s, free_s in zip(
                self.samples.of(f"split {number}{FREE}", direction),
                self.samples.of("unsplit" + FREE, direction),
                strict=True,
            )
        ]


def dtypes() -> dict[str, torch.dtype]:
    """What is measured: bfloat16 only where products are not emulated."""
    known = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return known if bfloat16_pays("cpu") else {"fp32": known["fp32"]}


def name_of(number: int) -> str:
    """Name of the program in so many replicas."""
    return f"overlapped {number}"


def steps_of(samples: Samples, name: str) -> list[float]:
    """What each round of a program took, forward and backward together."""
    return [sum(seconds.values()) for seconds in samples.by_name[name]]


def begin(quick: bool, size: Size, num_rounds: int) -> tuple[DelayedProcessGroup, Size, int]:
    """One thread, one seed, memory kept; the group, and what is measured: quick, a small size."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    if quick:
        size, num_rounds = Size(width=512, layers=2, tokens=256), 2
    return DelayedProcessGroup(0, TP, ANY_LINK), size, num_rounds


def measure(
    quick: bool, size: Size, num_rounds: int, *, width: int | None = None, is_short: bool = False
) -> list[Row]:
    """Hiding by ratio and dtype; rivals. quick: a small size, fewer of each."""
    group, size, num_rounds = begin(quick, size, num_rounds)
    rows: list[Row] = []
    for kind, dtype in list(dtypes().items())[: 1 if quick else 2]:
        if not quick:
            size = replace(size, width=width or WIDTHS[kind])
        name = f"{kind}, {size.tokens} tokens"
        bench = Bench(size, dtype, group, num_rounds)
        rows.append(
            row(f"{name}: free unsplit step, width {size.width}", "s", [bench.free_s], quick, 1.0)
        )
        for ratio in RATIOS[:1] if quick else RATIOS[:2] if is_short else RATIOS:
            where = f"{name}, ratio {ratio:g}, token axis"
            say(where)
            hiding = bench.hiding(ratio, "token")
            rows += hiding_rows(where, hiding, quick, ratio, TARGETS)
            if ratio == RATIOS[0]:
                where += ", causal split"
                say(where)
                causal = bench.hiding(ratio, "token", causal_split=True)
                rows += hiding_rows(where, causal, quick, ratio, CAUSAL_TARGETS)
            if ratio == RATIOS[0] and not (is_short and kind != "fp32"):
                say(f"{name}: rivals")
                rows += _rival_rows(name, size, dtype, bench, hiding.best_of_step(), quick)
        del bench
        gc.collect()
    load = os.getloadavg()[1]
    title = (
        "overlap: load average of the machine meanwhile (above 1.5, others disturbed the figures)"
    )
    return [*rows, row(title, "", [load], quick, 1.5, "lower")]


def hiding_rows(
    where: str,
    hiding: Hiding,
    quick: bool,
    ratio: float = 0.0,
    targets: Mapping[tuple[str, float], float] | None = None,
) -> list[Row]:
    """What was hidden in each direction, by the best number of replicas and by each."""
    rows: list[Row] = []
    for direction in DIRECTIONS:
        best = hiding.best(direction)
        target = (targets or {}).get((direction, ratio))
        title = f"{where}: {direction} net hidden, R <= 4 (R = {best})"
        rows.append(row(title, "", hiding.net(best, direction), quick, target))
        of_direction = hiding.ratio(direction)
        rows.append(row(f"{where}: {direction} communication / compute", "", of_direction, quick))
        for forms in hiding.forms:
            number, each = forms.num_replicas, f"{where}: {direction}, R = {forms.num_replicas}"
            predicted = [forms.predicted[direction].net_hidden]
            penalty = hiding.penalty(number, direction)
            expected = forms.predicted[direction]
            slower = [expected.split_free_s / expected.free_s]
            rows += [
                row(f"{each}: net hidden", "", hiding.net(number, direction), quick),
                row(f"{each}: net hidden, predicted", "", predicted, quick),
                row(f"{each}: split / unsplit, free", "x", penalty, quick, better="lower"),
                row(f"{each}: split / unsplit, predicted", "x", slower, quick, better="lower"),
            ]
    return rows


def _rival_rows(
    name: str, size: Size, dtype: torch.dtype, bench: Bench, number: int, quick: bool
) -> list[Row]:
    link, group = bench.link_of[RATIOS[0]], bench.group
    (ours,) = bench.forms(RATIOS[0], "token", (number,))
    programs = with_twin("unsplit", bench.unsplit, group, link)
    programs |= with_twin("ours", bench.step(Runnable(ours.overlapped)), group, link)
    placed, tokens_BT = Placed(size.config, TP, dtype), size.drawn()
    own = DelayedProcessGroup(0, TP, link, scale=0.0)
    with alone(), registered({"tp": group, placed.group: own}):
        functions = {
            "aot_eager": aot_eager(placed),
            "Inductor": compiled(placed, tokens_BT),
            "Inductor with overlap": compiled(placed, tokens_BT, bench.on(RATIOS[0]), link),
        }
        for rival, function in functions.items():
            run = _bound(placed, function, tokens_BT)
            programs |= with_twin(rival, run, own, link)
        samples = measure_rounds(programs, bench.num_rounds)
    forget()
    where = f"{name}, ratio {RATIOS[0]:g}, local batch 1"
    rows = [
        against(f"{name}: T0 / aot_eager of the placed model, free", samples, "unsplit" + FREE,
                "aot_eager" + FREE, quick, 1.02, "lower"),
        *(
            against(f"{where}: step of {rival} / ours (R = {number})", samples, rival, "ours",
                    quick, 1.0, "higher")
            for rival in ("aot_eager", "Inductor", "Inductor with overlap")
        ),
    ]  # fmt: skip
    for direction in DIRECTIONS:
        title = f"{where}: {direction} net hidden"
        overlap = net_hidden(samples, "Inductor", "Inductor with overlap", direction)
        rows.append(row(f"{title}, Inductor with overlap over Inductor", "", overlap, quick))
        rows.append(
            row(f"{title}, ours", "", net_hidden(samples, "unsplit", "ours", direction), quick)
        )
    return rows


def _bound(placed: Placed, function: Callable[[Tensor], Tensor], tokens_BT: Tensor) -> Step:
    return lambda: placed.step(function, tokens_BT)


def against(
    claim: str,
    samples: Samples,
    above: str,
    below: str,
    quick: bool,
    target: float | None,
    better: Literal["higher", "lower"],
) -> Row:
    """One program's step over another's, round by round."""
    ratios = [
        a / b for a, b in zip(steps_of(samples, above), steps_of(samples, below), strict=True)
    ]
    return row(claim, "x", ratios, quick, target, better)


def row(
    claim: str,
    unit: str,
    samples: list[float],
    quick: bool,
    target: float | None = None,
    better: Literal["higher", "lower"] = "higher",
) -> Row:
    """A row; a quick run is too small to hold or miss a target."""
    rounded = [round(x, 5) for x in samples]
    kept = None if quick else target
    return Row(claim=claim, unit=unit, target=kept, better=better, samples=rounded)


def say(text: str) -> None:
    """Tell where the benchmark is."""
    print(text, file=sys.stderr, flush=True)


def _main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--price", action="store_true")
    parser.add_argument("--batches", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--level", choices=("O1", "O2"))
    chosen, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    if chosen.price:
        run_benchmark("overlap_price", overlap_price.measure)
        return
    size = Size(tokens=chosen.tokens)
    if chosen.batches:
        from benchmarks.overlap_batches import measure_batches  # which uses this module

        num_rounds = chosen.rounds or 11
        run_benchmark("overlap_batches", lambda quick: measure_batches(quick, size, num_rounds))
        return
    if chosen.level is not None:
        from benchmarks.overlap_levels import measure_level  # which uses this module

        level, rounds = chosen.level, chosen.rounds or 5
        run_benchmark(
            f"overlap_{level.lower()}", lambda quick: measure_level(level, quick, size, rounds)
        )
        return
    options = {"width": chosen.width, "is_short": chosen.short}
    run_benchmark("overlap", lambda quick: measure(quick, size, chosen.rounds or 5, **options))


if __name__ == "__main__":
    _main()
