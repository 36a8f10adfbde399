"""A pipeline in time: the table of its ranks, played with the times of its stages.

A rank takes its tasks in order; a forward waits for the activations of the stage before, a backward
for the gradients of the stage behind, each sent when it is done and under way for `send_s` beside
what its rank computes next. A micro-batch's saved activations are held from the start of its
forward to the end of its backward (of a split one, of its weight part).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from plait.dryrun.pipeline_tables import Action, Table, Task, table_of
from plait.errors import GraphError
from plait.plan.parallel_plan import Pipeline


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """One stage and one micro-batch, in seconds. A whole backward takes input and weight part.

    saved_bytes: what the forward keeps for the backward.
    """

    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    saved_bytes: float = 0.0

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
    """All ranks, from the first start to the last end. By rank: busy, saved bytes at the most.

    in_flight: the most micro-batches that a rank holds, counted over its stages.
    """

    total_s: float
    busy_s: tuple[float, ...]
    peak_saved_bytes: tuple[float, ...]
    in_flight: tuple[int, ...]
    tasks: tuple[tuple[PlayedTask, ...], ...]

    @property
    def bubble(self) -> float:
        """Share of the time in which the busiest rank waits."""
        return 1 - max(self.busy_s) / self.total_s


def play(table: Table, stages: Sequence[StageTimes], *, send_s: float = 0.0) -> PipelineRun:
    """Play a table. stages: by number. Raises GraphError if its tasks wait for each other."""
    if len(stages) != table.num_stages:
        raise GraphError(f"{len(stages)} stages have times, the pipeline has {table.num_stages}.")
    done: dict[tuple[bool, int, int], float] = {}  # (is forward, stage, micro-batch) -> ready
    free_s = [0.0] * len(table.tasks)
    next_task = [0] * len(table.tasks)
    played: list[list[PlayedTask]] = [[] for _ in table.tasks]
    left = sum(map(len, table.tasks))
    pending = list(range(len(table.tasks)))
    while left:
        moved = False
        waiting: list[int] = []
        for rank in pending:
            tasks = table.tasks[rank]
            while next_task[rank] < len(tasks):
                task = tasks[next_task[rank]]
                ready_s = _ready_s(task, table, done, send_s)
                if ready_s is None:
                    break
                run = _run(task, max(free_s[rank], ready_s), stages[task.stage])
                free_s[rank] = run.end_s
                _note(task, run.end_s, done)
                played[rank].append(run)
                next_task[rank] += 1
                left -= 1
                moved = True
            if next_task[rank] < len(tasks):
                waiting.append(rank)
        if not moved:
            stuck = ", ".join(str(table.tasks[r][next_task[r]]) for r in waiting[:3])
            raise GraphError(f"the pipeline's tasks wait for each other in a circle: {stuck}.")
        pending = waiting
    return _summed(table, played, stages)


def pipeline_s(
    pipeline: Pipeline,
    num_micro_batches: int,
    stages: Sequence[StageTimes],
    num_ranks: int,
    *,
    send_s: float = 0.0,
) -> float:
    """The time of a pipeline of many micro-batches, from two of few.

    Once a pipeline is full each round of micro-batches adds the same time. Where there are more
    than six rounds, two shorter runs of the same remainder say what a round adds.
    """
    per_rank = len(stages) // num_ranks

    def run_s(count: int) -> float:
        return play(table_of(pipeline, num_ranks, per_rank, count), stages, send_s=send_s).total_s

    short = 3 * num_ranks + num_micro_batches % num_ranks
    if num_micro_batches <= short + 2 * num_ranks:
        return run_s(num_micro_batches)
    first_s, second_s = run_s(short), run_s(short + num_ranks)
    rounds = (num_micro_batches - short) // num_ranks
    return first_s + rounds * (second_s - first_s)


def one_rank(num_micro_batches: int, stage: StageTimes) -> PipelineRun:
    """Without a pipeline: each micro-batch forward and backward, one after another."""
    tasks = tuple(
        Task(action, 0, i, 2 * i + (action is Action.BACKWARD))
        for i in range(num_micro_batches)
        for action in (Action.FORWARD, Action.BACKWARD)
    )
    return play(Table((tasks,), (0,)), [stage])


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


def _ready_s(
    task: Task, table: Table, done: dict[tuple[bool, int, int], float], send_s: float
) -> float | None:
    """When what the task needs is there; None if nobody has made it yet."""
    is_forward = task.action is Action.FORWARD
    if task.action is Action.BACKWARD_WEIGHT:
        return done.get((False, task.stage, task.micro_batch))
    if is_forward and task.stage == 0:
        return 0.0
    if not is_forward and task.stage == table.num_stages - 1:
        return done.get((True, task.stage, task.micro_batch))
    near = task.stage + (-1 if is_forward else 1)
    made_s = done.get((is_forward, near, task.micro_batch))
    own_s = 0.0 if is_forward else done.get((True, task.stage, task.micro_batch))
    if made_s is None or own_s is None:
        return None
    is_sent = table.rank_of_stage[near] != table.rank_of_stage[task.stage]
    return max(own_s, made_s + (send_s if is_sent else 0.0))


def _run(task: Task, start_s: float, times: StageTimes) -> PlayedTask:
    duration_s = {
        Action.FORWARD: times.forward_s,
        Action.BACKWARD: times.backward_s,
        Action.BACKWARD_INPUT: times.backward_input_s,
        Action.BACKWARD_WEIGHT: times.backward_weight_s,
    }[task.action]
    return PlayedTask(task=task, start_s=start_s, end_s=start_s + duration_s)


def _note(task: Task, end_s: float, done: dict[tuple[bool, int, int], float]) -> None:
    if task.action is not Action.BACKWARD_WEIGHT:
        done[task.action is Action.FORWARD, task.stage, task.micro_batch] = end_s


def _summed(
    table: Table, played: Sequence[Sequence[PlayedTask]], stages: Sequence[StageTimes]
) -> PipelineRun:
    peaks: list[float] = []
    counts: list[int] = []
    for runs in played:
        split = {
            (run.task.stage, run.task.micro_batch)
            for run in runs
            if run.task.action is Action.BACKWARD_WEIGHT
        }
        held = peak = 0.0
        number = most = 0
        for run in runs:
            key = run.task.stage, run.task.micro_batch
            if run.task.action is Action.FORWARD:
                held, number = held + stages[run.task.stage].saved_bytes, number + 1
            elif run.task.action is not Action.BACKWARD_INPUT or key not in split:
                held, number = held - stages[run.task.stage].saved_bytes, number - 1
            peak, most = max(peak, held), max(most, number)
        peaks.append(peak)
        counts.append(most)
    return PipelineRun(
        total_s=max(runs[-1].end_s for runs in played if runs),
        busy_s=tuple(sum(run.end_s - run.start_s for run in runs) for runs in played),
        peak_saved_bytes=tuple(peaks),
        in_flight=tuple(counts),
        tasks=tuple(tuple(runs) for runs in played),
    )
