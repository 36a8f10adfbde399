"""What `dryrun_time` runs: its configurations, and steps of them on real tensors.

Of `dryrun_recipes` all that a schedule runs. Recipes in bfloat16 have a twin in float32, and are in
float32 alone where the CPU has no units for bfloat16, which it then emulates, 8 to 20 times slower.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import plait
from benchmarks.dryrun_recipes import (
    RECIPES,
    Recipe,
    make_optimizer,
    make_placed_model,
    make_schedule,
    make_tokens,
)
from benchmarks.result import finish
from plait.cost.timeline import Timeline
from plait.executor.optimize import Optimizers
from plait.executor.profile import profile_step
from plait.graph.schedule import Schedule

WARM_UP = 2
_WIDE: dict[str, Any] = {"hidden_size": 384, "intermediate_size": 1024}
_MIDDLE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704}
_NARROW: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
_BESIDE = (
    Recipe(name="llama wide bfloat16", changes=_WIDE, dtype=torch.bfloat16),
    Recipe(name="llama long bfloat16", tokens=512, batch=2, dtype=torch.bfloat16),
    Recipe(name="gpt2 bfloat16", model="gpt2", dtype=torch.bfloat16, recompute="full", batch=8),
    Recipe(name="llama wide, recompute, 16 rows", changes=_WIDE, batch=16, recompute="full"),
    Recipe(name="llama narrow, 16 rows", changes=_NARROW, batch=16, optimizer="sgd"),
    Recipe(name="gpt2 long", model="gpt2", tokens=512, batch=4),
    Recipe(name="mixtral, 3 micro-batches", model="mixtral", batch=12, micro_batches=3),
    Recipe(name="qwen3 middle, recompute", model="qwen3", changes=_MIDDLE, recompute="selective"),
    # With those of dryrun_recipes eight plans of one model on 8 rows.
    Recipe(name="llama, 8 rows", batch=8),
    Recipe(name="llama 4 micro-batches", batch=8, micro_batches=4),
    Recipe(name="llama 2 micro-batches, recompute", batch=8, micro_batches=2, recompute="full"),
    Recipe(
        name="llama 2 micro-batches, selective", batch=8, micro_batches=2, recompute="selective"
    ),
)
"""On one core, beside those of `dryrun_recipes`."""
SEEN_BY_RANKS = (
    Recipe(name="llama narrow", changes=_NARROW),
    RECIPES["llama long"],
    RECIPES["llama full recompute"],
    RECIPES["llama 4 micro-batches, recompute"],
    Recipe(name="llama middle", changes=_MIDDLE),
    RECIPES["gpt2"],
    Recipe(name="llama middle, tp", changes=_MIDDLE, parallel="tp"),
    Recipe(name="gpt2, fsdp", model="gpt2", parallel="fsdp"),
)
"""What two ranks do for calibration, none of it compared: models of one rank on both at once too,
because a core is slower while the other works."""


@dataclass(eq=False)
class Run:
    """A recipe, and what was measured of it. clock_s: steps before they were made comparable."""

    recipe: Recipe
    schedule: Schedule
    steps_s: list[float] = field(default_factory=list[float])
    timelines: list[Timeline] = field(default_factory=list[Timeline])
    clock_s: list[float] = field(default_factory=list[float])

    @property
    def spread(self) -> float:
        """From the 10th to the 90th percentile of single steps by the clock, over their median."""
        steps_s = self.clock_s or self.steps_s
        tenths = statistics.quantiles(steps_s, n=10)
        return (tenths[-1] - tenths[0]) / statistics.median(steps_s)

    def add(self, step_s: float, timeline: Timeline) -> None:
        """One more step, and one more profile."""
        self.steps_s.append(step_s)
        self.timelines.append(timeline)


class Speed:
    """How fast this core is from moment to moment: a few ms of fixed work, timed in between.

    Whoever works on the other core slows this one, by a third on the machine of the committed
    result, for minutes; two configurations are comparable at one speed only.
    """

    def __init__(self) -> None:
        self.square = torch.randn(256, 256)
        self.vector = torch.randn(2**17)
        self.all_s: list[float] = []
        self.probe()

    def probe(self) -> float:
        """Time of the work, now."""
        found_s: list[float] = []
        for _ in range(3):  # the median: one may be interrupted
            start_s = time.perf_counter()
            for _ in range(3):
                torch.mm(self.square, self.square)
                for _ in range(4):
                    self.vector.add(self.vector).mul_(0.5)
            found_s.append(time.perf_counter() - start_s)
        self.all_s.append(statistics.median(found_s))
        return self.all_s[-1]

    def measure(self, run: Run, program: "Program") -> None:
        """Time a step and profile one; each keeps the mean of the probes on both its sides.

        They stand behind a step that nobody times, as in a training: memory that the program before
        gave back to the system is touched anew there, which took a large program a fifth longer.
        """
        program.run()
        before_s = self.probe()
        step_s, between_s = program.step_s(), self.probe()
        timeline, after_s = program.profile(), self.probe()
        run.clock_s.append(step_s)
        run.add(
            step_s / (before_s + between_s),
            _times(timeline, 1 / (between_s + after_s)),
        )

    def level(self, runs: Sequence[Run]) -> None:
        """Make seconds of what was measured, at the usual speed."""
        usual_s = 2 * statistics.median(self.all_s)
        for run in runs:
            run.steps_s = [each * usual_s for each in run.steps_s]
            run.timelines = [_times(each, usual_s) for each in run.timelines]


def _times(timeline: Timeline, factor: float) -> Timeline:
    """So many times as long."""
    return Timeline(
        tuple(replace(each, duration_s=each.duration_s * factor) for each in timeline.events)
    )


@dataclass(eq=False)
class Program:
    """A schedule with a model to run on."""

    schedule: Schedule
    model: nn.Module
    tokens_BT: Tensor
    optimizer: Optimizers
    mesh: DeviceMesh | None = None

    def run(self) -> None:
        """One step."""
        plait.run(
            self.schedule, self.model, self.tokens_BT, optimizer=self.optimizer, mesh=self.mesh
        )
        finish()
        self._clear()

    def step_s(self) -> float:
        """Time of a step."""
        finish()
        start_s = time.perf_counter()
        self.run()
        return time.perf_counter() - start_s

    def profile(self) -> Timeline:
        """Operators of a step."""
        found = profile_step(
            self.schedule, self.model, self.tokens_BT, optimizer=self.optimizer, mesh=self.mesh
        )
        self._clear()
        return found.timeline

    def _clear(self) -> None:
        """Gradients, which an optimizer of the schedule has cleared."""
        if self.optimizer is None:
            self.model.zero_grad()


def build(recipe: Recipe, schedule: Schedule, mesh: DeviceMesh | None = None) -> Program:
    """Make a model of this rank, and let it warm up."""
    model = make_placed_model(recipe, mesh)
    optimizer = make_optimizer(recipe, model)
    program = Program(schedule, model, make_tokens(recipe), optimizer, mesh)
    for _ in range(WARM_UP):
        program.run()
    return program


def run_of(recipe: Recipe, device: str = "meta") -> Run:
    """Compile."""
    return Run(recipe, make_schedule(recipe, device))


def on_one_core(*, has_bfloat16: bool) -> list[Recipe]:
    """Configurations of one rank, each once. has_bfloat16: the CPU has units for its products."""
    found: dict[str, Recipe] = {}
    recipes = [
        x for x in RECIPES.values() if x.way == "schedule" and x.level == "O0" and not x.parallel
    ]
    for recipe in (*recipes, *_BESIDE):
        if recipe.dtype is torch.float32:
            found.setdefault(recipe.name, recipe)
            continue
        if has_bfloat16:
            found[recipe.name] = recipe
        name = recipe.name.replace("bfloat16", "float32")
        wide = name.removesuffix(" float32")  # the name of a float32 recipe with changes
        if name not in found and wide not in found:
            found[name] = replace(recipe, name=name, dtype=torch.float32)
    return list(found.values())


def on_two_ranks() -> list[Recipe]:
    """Configurations of two ranks."""
    return [x for x in RECIPES.values() if x.way == "schedule" and x.parallel]
