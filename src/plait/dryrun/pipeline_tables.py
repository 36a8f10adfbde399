"""Who works on which micro-batch when: the tables of `torch.distributed.pipelining`, as plain data.

PyTorch's own classes make them, from stages that hold no module. What these classes need besides
(sends and receives between the actions) is left out: the simulation knows what waits for what.
"""

# pyright: basic
# (The tables are no public API of PyTorch.)

from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from types import SimpleNamespace

from torch.distributed.pipelining import schedules
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

from plait.errors import PlanError
from plait.plan.parallel_plan import Pipeline


class Action(Enum):
    """What a rank does with one micro-batch on one of its stages."""

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"


@dataclass(frozen=True, slots=True)
class Task:
    """An action; of two tasks with one `slot` number on a rank, each runs beside the other."""

    action: Action
    stage: int
    micro_batch: int
    slot: int


@dataclass(frozen=True, eq=False)
class Table:
    """The tasks of each rank in order, and the rank of each stage. Equal is the same object."""

    tasks: tuple[tuple[Task, ...], ...]
    rank_of_stage: tuple[int, ...]

    @property
    def num_stages(self) -> int:
        """Stages of all ranks."""
        return len(self.rank_of_stage)


def _only_table(kind: type) -> type:
    """The class without the sends and receives that it adds to its table."""

    def keep_table(self, actions, format="compute_only") -> None:
        pass

    return type(kind.__name__, (kind,), {"_prepare_schedule_with_comms": keep_table})


_CLASSES = {
    Pipeline.GPIPE: schedules.ScheduleGPipe,
    Pipeline.ONE_F_ONE_B: schedules.Schedule1F1B,
    Pipeline.INTERLEAVED: _only_table(schedules.ScheduleInterleaved1F1B),
    Pipeline.ZERO_BUBBLE: _only_table(schedules.ScheduleInterleavedZeroBubble),
    Pipeline.ZBV: _only_table(schedules.ScheduleZBVZeroBubble),
    Pipeline.DUAL_PIPE_V: _only_table(schedules.ScheduleDualPipeV),
}
_V_SHAPED = (Pipeline.ZBV, Pipeline.DUAL_PIPE_V)


@lru_cache(maxsize=512)
def table_of(
    pipeline: Pipeline, num_ranks: int, stages_per_rank: int, num_micro_batches: int
) -> Table:
    """The table of a pipeline. Raises PlanError with PyTorch's reason where there is none."""
    num_stages = num_ranks * stages_per_rank
    stages = [
        SimpleNamespace(
            num_stages=num_stages,
            group_size=num_ranks,
            group_rank=0,
            stage_index=i * num_ranks,
            submod=None,
        )
        for i in range(stages_per_rank)
    ]
    kind = _CLASSES[pipeline]
    is_single = pipeline in (Pipeline.GPIPE, Pipeline.ONE_F_ONE_B)
    try:
        made = kind(stages[0] if is_single else stages, num_micro_batches, loss_fn=_no_loss)
    except ValueError as error:
        raise PlanError(
            f"pipeline {pipeline.value!r} of {num_ranks} ranks cannot take "
            f"num_micro_batches={num_micro_batches}: {error}"
        ) from None
    style = "v" if pipeline in _V_SHAPED else "loop"
    ranks = generate_stage_to_rank_mapping(num_ranks, num_stages, style=style)
    order = made.pipeline_order
    return Table(
        tasks=tuple(_numbered_from_0(_tasks(order[rank])) for rank in range(num_ranks)),
        rank_of_stage=tuple(ranks[stage] for stage in range(num_stages)),
    )


@lru_cache(maxsize=64)
def table_of_one(num_micro_batches: int) -> Table:
    """Without a pipeline: each micro-batch forward and backward, one after another."""
    tasks = tuple(
        Task(action, 0, i, 2 * i + (action is Action.BACKWARD))
        for i in range(num_micro_batches)
        for action in (Action.FORWARD, Action.BACKWARD)
    )
    return Table((tasks,), (0,))


def _no_loss(*_: object) -> None:
    """Stand for a loss: with it a schedule has backwards."""


def _numbered_from_0(tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    """The tasks with forwards counted as `step` counts them.

    The table that torch 2.13's Schedule1F1B shows numbers the last rank's forwards from 1, and its
    backwards from 0; what it runs starts at 0.
    """
    numbers = [task.micro_batch for task in tasks if task.action is Action.FORWARD]
    if not numbers or min(numbers) == 0:
        return tasks
    return tuple(
        replace(task, micro_batch=task.micro_batch - 1) if task.action is Action.FORWARD else task
        for task in tasks
    )


def _tasks(actions) -> tuple[Task, ...]:
    known = {action.value: action for action in Action}
    found: list[Task] = []
    for slot, action in enumerate(actions):
        if action is None:
            continue
        parts = action.sub_actions or (action,)
        for part in parts:
            if part.computation_type.value in known:
                kind = known[part.computation_type.value]
                found.append(Task(kind, part.stage_index, part.microbatch_index, slot))
    return tuple(found)
