"""A pipeline in time: the table of its ranks, played with the times of its stages.

A rank takes its tasks in order; a forward waits for the activations of the stage before, a backward
for the gradients of the stage behind, each sent when it is done and under way for `send_s` beside
what its rank computes next. A micro-batch's saved activations are held from the start of its
forward to the end of its backward (of a split one, of its weight part).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from plait.cost.simulate import beside_s
from plait.dryrun.pipeline_tables import Action, Table, Task, table_of
from plait.errors import GraphError
from plait.plan.parallel_plan import Pipeline

_ROUNDS = 4  # of micro-batches over ranks, after which a pipeline is full


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """One stage and one micro-batch, in seconds. A whole backward takes input and weight part.

    saved_bytes: what the forward keeps for the backward. exchange_s: in either pass, messages with
    nothing of the stage beside them.
    """

    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    saved_bytes: float = 0.0
    exchange_s: float = 0.0

    @property
    def backward_s(self) -> float:
        """The whole backward."""
        return self.backward_input_s + self.backward_weight_s


@dataclass(frozen=True, kw_only=True)
class PlayedTask:
    """A task as it ran."""

    task: Task
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class PipelineRun:
    """All ranks, from the first start to the last end. starts_s, ends_s: of all tasks, in order.

    hidden_s: of each rank, what ran beside the other task of a pair and is not in its busy time.
    """

    table: Table
    total_s: float
    starts_s: NDArray[np.float64]
    ends_s: NDArray[np.float64]
    hidden_s: tuple[float, ...]

    @cached_property
    def busy_s(self) -> tuple[float, ...]:
        """Of each rank, its tasks."""
        each_s = self.ends_s - self.starts_s
        return tuple(float(each_s[held].sum()) for held in _by_rank(self.table))

    @property
    def num_micro_batches(self) -> int:
        """Of the table."""
        return 1 + max(task.micro_batch for task in self.table.tasks[0])

    @property
    def bubble(self) -> float:
        """Share of the time in which the busiest rank waits."""
        return 1 - max(self.busy_s) / self.total_s

    def tasks(self, rank: int) -> list[PlayedTask]:
        """What a rank did, and when."""
        held = _by_rank(self.table)[rank]
        starts_s, ends_s = self.starts_s[held].tolist(), self.ends_s[held].tolist()
        rows = zip(self.table.tasks[rank], starts_s, ends_s, strict=True)
        return [PlayedTask(task=task, start_s=start, end_s=end) for task, start, end in rows]


@dataclass(frozen=True)
class InFlight:
    """The most that each rank holds: micro-batches, and bytes of their saved activations."""

    micro_batches: tuple[int, ...]
    saved_bytes: tuple[float, ...]


def play(
    table: Table,
    stages: Sequence[StageTimes],
    *,
    send_s: float = 0.0,
    interference: float = 1.0,
) -> PipelineRun:
    """Play a table. stages: by number. Raises GraphError if its tasks wait for each other.

    Of two tasks that run beside each other, as DualPipeV pairs them, the exchanges of each hide
    behind the computation of both, slowed by `interference`; the second ends so much earlier.
    """
    if len(stages) != table.num_stages:
        raise GraphError(f"{len(stages)} stages have times, the pipeline has {table.num_stages}.")
    order = _order_of(table)
    durations_s = [
        (each.forward_s, each.backward_s, each.backward_input_s, each.backward_weight_s)
        for each in stages
    ]
    lags_s = (0.0, send_s)
    starts = [0.0] * len(order)
    ends = [0.0] * (len(order) + 1)  # the last, also -1, is that of no task
    hidden_s = [0.0] * len(table.tasks)
    for i, (before, needs, is_sent, stage, kind) in enumerate(order):
        start_s = ends[before]
        ready_s = ends[needs] + lags_s[is_sent]
        if ready_s > start_s:
            start_s = ready_s
        starts[i] = start_s
        if kind != _PAIRED:
            ends[i] = start_s + durations_s[stage][kind]
            continue
        beside = order[before][3]
        sent_s = stages[beside].exchange_s + stages[stage].exchange_s
        pair_s = stages[beside].forward_s + stages[stage].backward_s
        saved_s = pair_s - beside_s(pair_s - sent_s, sent_s, interference)
        ends[i] = start_s + stages[stage].backward_s - saved_s
        hidden_s[table.rank_of_stage[stage]] += saved_s
    return PipelineRun(
        table=table,
        total_s=max(ends),
        starts_s=np.array(starts),
        ends_s=np.array(ends[:-1]),
        hidden_s=tuple(hidden_s),
    )


def in_flight(table: Table, saved_bytes: Sequence[float]) -> InFlight:
    """The most that each rank holds. saved_bytes: of a micro-batch, by stage."""
    micro_batches: list[int] = []
    most_bytes: list[float] = []
    for rank in range(len(table.tasks)):
        stages, held = _held(table, rank)
        own = np.asarray([saved_bytes[stage] for stage in stages], dtype=np.float64)
        micro_batches.append(int(held.sum(axis=1).max()))
        most_bytes.append(float((held @ own).max()))
    return InFlight(micro_batches=tuple(micro_batches), saved_bytes=tuple(most_bytes))


def pipeline_s(
    pipeline: Pipeline,
    num_micro_batches: int,
    stages: Sequence[StageTimes],
    num_ranks: int,
    *,
    send_s: float = 0.0,
) -> float:
    """The time of a pipeline of many micro-batches, from one of few.

    Once a pipeline is full, each round of as many micro-batches as ranks adds the same time, which
    the difference of two short runs tells.
    """
    per_rank = len(stages) // num_ranks

    def run_s(count: int) -> float:
        return play(table_of(pipeline, num_ranks, per_rank, count), stages, send_s=send_s).total_s

    short = shorter(num_micro_batches, num_ranks)
    whole_s = run_s(short)
    if short == num_micro_batches:
        return whole_s
    round_s = whole_s - run_s(short - num_ranks)
    return whole_s + (num_micro_batches - short) // num_ranks * round_s


def shorter(num_micro_batches: int, num_ranks: int) -> int:
    """A number of micro-batches with the same remainder that fills a pipeline."""
    rounds = num_micro_batches // num_ranks
    return num_micro_batches - max(0, rounds - _ROUNDS) * num_ranks


def with_offload(stage: StageTimes, share: float, bandwidth_bytes_per_s: float) -> StageTimes:
    """A stage whose saved activations go to the host, in part: out in the forward, back later.

    The copies run beside the computation, and lengthen a pass where they take longer than it.
    """
    moved_s = share * stage.saved_bytes / bandwidth_bytes_per_s
    late_s = max(0.0, moved_s - stage.backward_s)
    return replace(
        stage,
        forward_s=max(stage.forward_s, moved_s),
        backward_input_s=stage.backward_input_s + late_s,
        saved_bytes=(1 - share) * stage.saved_bytes,
    )


_KINDS = {
    Action.FORWARD: 0,
    Action.BACKWARD: 1,
    Action.BACKWARD_INPUT: 2,
    Action.BACKWARD_WEIGHT: 3,
}
_PAIRED = 4
"""Of a backward right behind a forward that it runs beside."""
_Entry = tuple[int, int, bool, int, int]
"""The task before it on its rank, the task that it waits for (-1: none), whether its result is sent
from another rank, its stage, and its kind."""


@lru_cache(maxsize=512)
def _order_of(table: Table) -> tuple[_Entry, ...]:
    """All tasks so that each stands behind what it waits for."""
    return _ordered(table)[0]


@lru_cache(maxsize=512)
def _by_rank(table: Table) -> tuple[NDArray[np.int64], ...]:
    """Where in that order the tasks of each rank stand."""
    return tuple(np.array(held) for held in _ordered(table)[1])


@lru_cache(maxsize=4096)
def _held(table: Table, rank: int) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """A rank's stages, and the micro-batches of each that it holds, (moment, stage).

    Only moments at which it holds something that it did not hold before.
    """
    tasks = table.tasks[rank]
    stages = tuple(dict.fromkeys(task.stage for task in tasks))
    column = {stage: i for i, stage in enumerate(stages)}
    change = np.zeros((len(tasks), len(stages)))
    weights = {
        (task.stage, task.micro_batch) for task in tasks if task.action is Action.BACKWARD_WEIGHT
    }
    for i, task in enumerate(tasks):
        if task.action is Action.FORWARD:
            change[i, column[task.stage]] = 1
        elif task.action is not Action.BACKWARD_INPUT or (
            (task.stage, task.micro_batch) not in weights
        ):
            change[i, column[task.stage]] = -1
    return stages, np.unique(change.cumsum(axis=0), axis=0)


@lru_cache(maxsize=512)
def _ordered(table: Table) -> tuple[tuple[_Entry, ...], tuple[tuple[int, ...], ...]]:
    made: dict[tuple[bool, int, int], int] = {}
    order: list[_Entry] = []
    held: list[list[int]] = [[] for _ in table.tasks]
    pending = list(range(len(table.tasks)))
    while pending:
        size = len(order)
        for rank in pending:
            tasks = table.tasks[rank]
            while len(held[rank]) < len(tasks):
                task = tasks[len(held[rank])]
                needs = _needs(task, table, made)
                if needs is None:
                    break
                before = held[rank][-1] if held[rank] else -1
                is_sent = needs >= 0 and _is_sent(task, table)
                if task.action is not Action.BACKWARD_WEIGHT:
                    key = task.action is Action.FORWARD, task.stage, task.micro_batch
                    made[key] = len(order)
                held[rank].append(len(order))
                kind = _KINDS[task.action]
                if _is_paired(tasks, len(held[rank]) - 1):
                    kind = _PAIRED
                order.append((before, needs, is_sent, task.stage, kind))
        pending = [r for r in pending if len(held[r]) < len(table.tasks[r])]
        if len(order) == size:
            stuck = ", ".join(str(table.tasks[r][len(held[r])]) for r in pending[:3])
            raise GraphError(f"the pipeline's tasks wait for each other in a circle: {stuck}.")
    return tuple(order), tuple(map(tuple, held))


def _is_paired(tasks: Sequence[Task], i: int) -> bool:
    return (
        i > 0
        and tasks[i].slot == tasks[i - 1].slot
        and (tasks[i - 1].action, tasks[i].action) == (Action.FORWARD, Action.BACKWARD)
    )


def _needs(task: Task, table: Table, made: dict[tuple[bool, int, int], int]) -> int | None:
    """The task whose result this one waits for, -1 if for none; None if it has not been made.

    A backward also needs its own forward, which its rank has done before.
    """
    is_forward = task.action is Action.FORWARD
    if task.action is Action.BACKWARD_WEIGHT:
        return made.get((False, task.stage, task.micro_batch))
    if is_forward and task.stage == 0:
        return -1
    if not is_forward:
        if (True, task.stage, task.micro_batch) not in made:
            return None
        if task.stage == table.num_stages - 1:
            return made[True, task.stage, task.micro_batch]
    near = task.stage + (-1 if is_forward else 1)
    return made.get((is_forward, near, task.micro_batch))


def _is_sent(task: Task, table: Table) -> bool:
    if task.action is Action.BACKWARD_WEIGHT:
        return False
    near = task.stage + (-1 if task.action is Action.FORWARD else 1)
    if not 0 <= near < table.num_stages:
        return False
    return table.rank_of_stage[near] != table.rank_of_stage[task.stage]
