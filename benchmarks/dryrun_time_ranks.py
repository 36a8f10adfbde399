"""Two ranks of `dryrun_time`: real processes, a core each, that exchange messages over gloo.

They wait for the parent, and in each of its rounds do what is compared, what is learnt from, and
messages by themselves, as nccl-tests does: launched, waited for, and launched again.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.dryrun_recipes import Recipe, make_schedule, plait_mesh
from benchmarks.dryrun_time_runs import Program, Run, build
from plait.cost.collectives import Collective
from plait.cost.nccl_tests import Measured
from plait.cost.timeline import Timeline

NUM_RANKS = 2
MESSAGE_BYTES = tuple(4**i for i in range(5, 13))  # 1 KiB to 16 MiB
_REPEATS = 3  # of a message
_STEPS = 3  # of each program in a round: two cores that wait for each other vary most
TIME_LIMIT_S = 300  # of a round: other work may stop a rank for minutes
_Message = tuple[Collective, int]


@dataclass
class Round:
    """What the first rank measured: in the order of the compared and of the seen.

    compared_s: steps of each. seen: as many of each, one behind the other.
    """

    compared_s: list[list[float]] = field(default_factory=list[list[float]])
    seen: list[tuple[float, Timeline]] = field(default_factory=list[tuple[float, Timeline]])
    messages_s: dict[_Message, float] = field(default_factory=dict[_Message, float])


class Ranks(AbstractContextManager["Ranks"]):
    """Both processes. compared: runs to time; seen: to time and to profile. One is of all ranks."""

    def __init__(self, compared: Sequence[Run], seen: Sequence[Run]) -> None:
        self.compared, self.seen = compared, seen
        self.messages_s: dict[_Message, list[float]] = {}
        self.folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.dryrun_time_ranks"])
        recipes = [[run.recipe for run in runs] for runs in (compared, seen)]
        self.processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        for rank in range(NUM_RANKS):
            ours, theirs = context.Pipe()
            store_file = str(Path(self.folder.name) / "store")
            process = context.Process(target=_work, args=(rank, store_file, theirs, *recipes))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(ours)
        self._replies()  # they are ready

    def __exit__(self, *_: object) -> None:
        """End them."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(10)
            process.kill()
        self.folder.cleanup()

    def round(self) -> None:
        """Let them do everything once."""
        for connection in self.connections:
            connection.send("round")
        found: Round = self._replies()[0]
        for run, steps_s in zip(self.compared, found.compared_s, strict=True):
            run.steps_s += steps_s
        for i, (step_s, timeline) in enumerate(found.seen):
            self.seen[i // _STEPS].add(step_s, timeline)
        for message, message_s in found.messages_s.items():
            self.messages_s.setdefault(message, []).append(message_s)

    def measured(self) -> list[Measured]:
        """Messages, as what nccl-tests finds."""
        return [
            Measured(
                collective=collective,
                num_ranks=NUM_RANKS,
                ranks_per_node=NUM_RANKS,
                num_bytes=MESSAGE_BYTES,
                durations_s=tuple(
                    statistics.median(self.messages_s[collective, size]) for size in MESSAGE_BYTES
                ),
            )
            for collective in _LAUNCH
        ]

    def _replies(self) -> list[Any]:
        """Of both. Raises RuntimeError if one ends, or takes too long."""
        found: list[Any] = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(TIME_LIMIT_S):
                raise RuntimeError(f"rank {rank} took more than {TIME_LIMIT_S} s.")
            try:
                found.append(connection.recv())
            except EOFError as error:
                raise RuntimeError(f"rank {rank} ended.") from error
        return found


def _work(
    rank: int,
    store_file: str,
    parent: Connection,
    compared: Sequence[Recipe],
    seen: Sequence[Recipe],
) -> None:
    """One rank, until the parent hangs up."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Compiled before there is a group: a plan of one rank has none.
    schedules = {recipe.name: make_schedule(recipe) for recipe in (*compared, *seen)}
    store = dist.FileStore(store_file, NUM_RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS)

    def program(recipe: Recipe) -> Program:
        with plait_mesh(recipe) if recipe.parallel else nullcontext() as mesh:
            return build(recipe, schedules[recipe.name], mesh)

    both = [program(recipe) for recipe in compared], [program(recipe) for recipe in seen]
    parent.send("ready")
    try:
        while parent.recv():
            parent.send(_round(*both))
    except EOFError:
        os._exit(0)  # gloo's threads may outlive the group


def _round(compared: Sequence[Program], seen: Sequence[Program]) -> Round:
    found = Round()
    for program in compared:
        program.run()  # as in `Speed.measure`
        steps_s: list[float] = []
        for _ in range(_STEPS):
            dist.barrier()
            steps_s.append(program.step_s())
        found.compared_s.append(steps_s)
    for program in seen:
        program.run()
        for _ in range(_STEPS):
            dist.barrier()
            step_s = program.step_s()
            dist.barrier()
            found.seen.append((step_s, program.profile()))
    group = dist.group.WORLD.group_name  # pyright: ignore[reportOptionalMemberAccess]
    for collective, launch in _LAUNCH.items():
        for num_bytes in MESSAGE_BYTES:
            dist.barrier()
            found.messages_s[collective, num_bytes] = _message_s(launch, num_bytes, group)
    return found


def _message_s(launch: Any, num_bytes: int, group: str) -> float:
    x = torch.zeros(num_bytes // torch.float32.itemsize)
    seconds: list[float] = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        torch.ops._c10d_functional.wait_tensor(launch(x, group))
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return torch.ops._c10d_functional.all_reduce_(x, "sum", group)


def _all_gather(x: Tensor, group: str) -> Tensor:
    part = x[: len(x) // NUM_RANKS]
    return torch.ops._c10d_functional.all_gather_into_tensor(part, NUM_RANKS, group)


def _reduce_scatter(x: Tensor, group: str) -> Tensor:
    return torch.ops._c10d_functional.reduce_scatter_tensor(x, "sum", NUM_RANKS, group)


_LAUNCH = {
    Collective.ALL_REDUCE: _all_reduce,
    Collective.ALL_GATHER: _all_gather,
    Collective.REDUCE_SCATTER: _reduce_scatter,
}
"""Each takes the larger side of a message."""
