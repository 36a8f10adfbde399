"""What the caching allocator reserves on a rank of a large job: its requests, played in order.

A rank's parameters and gradients are made first; then it plays the tasks of its pipeline, each a
pass over the pieces of a stage; the optimizer's state is made behind the first step, so the second
step finds the holes that the first one left. Of a long pipeline only so many tasks are played that
the most micro-batches are in flight and the steady state has come round: what follows repeats.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from plait.dryrun.allocator import Reserved, with_fragments
from plait.dryrun.job_memory import STATE_KINDS
from plait.dryrun.piece import Piece
from plait.dryrun.pipeline_tables import Action, Task
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.requests import CallRequests, Change
from plait.plan.parallel_plan import ParallelPlan

_FREED = -1
_STEADY = 4  # tasks behind the moment at which most is in flight
_MASTER_BYTES = 4
_PARAMETERS, _GRADIENTS, _OPTIMIZER = STATE_KINDS

Request = tuple[int, int]
"""A number and its bytes; -1: it is given back."""


@dataclass(frozen=True)
class Fragments:
    """What is reserved, with segments of a fixed size, and with segments that grow."""

    fixed: Reserved
    expandable: Reserved


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A call of a piece. gathered_bytes: its parameters, where they are gathered for each pass."""

    requests: CallRequests
    offloaded: frozenset[int]
    gathered_bytes: int = 0


@dataclass
class RankRequests:
    """A rank's requests. stages: by number, the pieces of each in order, as many as there are.

    state_bytes: of the ledger's kinds. gathered_bytes: of each piece, 0 without reshard.
    boundary_bytes: of a stage's output, which has buffers in and out, forward and backward.
    """

    job: PretrainJob
    plan: ParallelPlan
    stages: Mapping[int, Sequence[Piece]]
    tasks: Sequence[Task]
    sequences: float
    state_bytes: Mapping[str, int]
    gathered_bytes: Mapping[str, int]
    boundary_bytes: int = 0
    numbers: Iterator[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        """Scale the pieces' calls once."""
        known: dict[str, list[_Call]] = {}
        for pieces in self.stages.values():
            for piece in pieces:
                if piece.name not in known:
                    known[piece.name] = self._calls(piece)
        self.calls = {
            stage: [call for piece in pieces for call in known[piece.name]]
            for stage, pieces in self.stages.items()
        }
        self.live: dict[tuple[int, int], list[_Running]] = {}

    def reserved(self, limit_bytes: int | None = None) -> Fragments:
        """Play two steps. limit_bytes: what is there for PyTorch's allocator."""
        requests = list(self.requests())
        return Fragments(
            with_fragments(requests, limit_bytes=limit_bytes),
            with_fragments(requests, expandable=True, limit_bytes=limit_bytes),
        )

    def requests(self) -> Iterator[Request]:
        """All requests of two steps."""
        yield from self._state(_PARAMETERS, 1)
        yield from self._state(_GRADIENTS, 1)
        if self.plan.pp > 1:
            for _ in range(4):
                yield next(self.numbers), self.boundary_bytes
        tasks = shortened(self.tasks)
        yield from self._step(tasks)
        yield from self._state(_OPTIMIZER, max(1, self.job.optimizer_bytes // _MASTER_BYTES))
        yield from self._step(tasks)

    def _state(self, kind: str, parts: int) -> Iterator[Request]:
        """A tensor for each parameter and part, in proportion to the parameter's size."""
        tensors = [x for pieces in self.stages.values() for p in pieces for x in p.parameters]
        whole = sum(x.num_bytes for x in tensors)
        for each in tensors:
            size = self.state_bytes[kind] * each.num_bytes / whole / parts
            for _ in range(parts):
                yield next(self.numbers), round(size)

    def _step(self, tasks: Sequence[Task]) -> Iterator[Request]:
        parted = {_key(task) for task in tasks if task.action is Action.BACKWARD_WEIGHT}
        for task in tasks:
            if task.action is Action.FORWARD:
                yield from self._forward(task)
            elif task.action is not Action.BACKWARD_INPUT or _key(task) not in parted:
                # A parted backward holds what is saved to its end; it is played there, as a whole.
                yield from self._backward(task)

    def _forward(self, task: Task) -> Iterator[Request]:
        calls = self.calls[task.stage]
        running: list[_Running] = []
        before: list[int] = []
        if task.stage and calls and calls[0].requests.input_bytes:
            before = [next(self.numbers)]
            yield before[0], calls[0].requests.input_bytes
        gathers = _Gathers(calls, self.numbers)
        for i, call in enumerate(calls):
            yield from gathers.around(i)
            one = _Running(call, self.numbers)
            yield from one.play(call.requests.forward)
            if call.requests.input_bytes:
                one.kept = before
            else:
                yield from ((number, _FREED) for number in before)
            yield from one.give_back(call.offloaded)
            before = [one.at[number] for number in sorted(call.requests.results)]
            running.append(one)
        yield from gathers.end()
        yield from ((number, _FREED) for number in before)
        self.live[_key(task)] = running

    def _backward(self, task: Task) -> Iterator[Request]:
        running = self.live.pop(_key(task))
        before: list[int] = []
        gathers = _Gathers([each.call for each in reversed(running)], self.numbers)
        for i, one in enumerate(reversed(running)):
            yield from gathers.around(i)
            yield from one.make_again(one.call.offloaded)
            yield from one.play(one.call.requests.backward)
            yield from ((number, _FREED) for number in (*before, *one.kept))
            before = [one.at[number] for number in sorted(one.call.requests.gradients)]
        yield from gathers.end()
        yield from ((number, _FREED) for number in before)

    def _calls(self, piece: Piece) -> list[_Call]:
        found: list[_Call] = []
        for scaled in piece.calls:
            call = scaled.at(self.sequences)
            sizes = {
                number: size // self.plan.ep if number in call.experts else size
                for number, size in call.sizes.items()
            }
            found.append(
                _Call(
                    requests=replace(call, sizes=sizes),
                    offloaded=_offloaded(call.saved, sizes, self.job.offload),
                    gathered_bytes=0 if found else self.gathered_bytes[piece.name],
                )
            )
        return found


@dataclass
class _Running:
    """A call on one micro-batch. at: the rank's number of each of its tensors that was made."""

    call: _Call
    numbers: Iterator[int]
    at: dict[int, int] = field(default_factory=dict[int, int])
    kept: list[int] = field(default_factory=list[int])

    def play(self, changes: Sequence[Change]) -> Iterator[Request]:
        for number, is_made in changes:
            if is_made:
                self.at[number] = next(self.numbers)
                yield self.at[number], self.call.requests.sizes[number]
            else:
                yield self.at[number], _FREED

    def give_back(self, numbers: frozenset[int]) -> Iterator[Request]:
        yield from ((self.at[number], _FREED) for number in sorted(numbers))

    def make_again(self, numbers: frozenset[int]) -> Iterator[Request]:
        yield from self.play([(number, True) for number in sorted(numbers)])


@dataclass
class _Gathers:
    """Whole parameters of a piece, made while the one before computes, freed behind it."""

    calls: Sequence[_Call]
    numbers: Iterator[int]
    alive: dict[int, int] = field(default_factory=dict[int, int])

    def around(self, i: int) -> Iterator[Request]:
        for old in [k for k in self.alive if k < i]:
            yield self.alive.pop(old), _FREED
        for k in range(i, min(i + 2, len(self.calls))):
            if k not in self.alive and self.calls[k].gathered_bytes:
                self.alive[k] = next(self.numbers)
                yield self.alive[k], self.calls[k].gathered_bytes

    def end(self) -> Iterator[Request]:
        for number in self.alive.values():
            yield number, _FREED
        self.alive.clear()


def shortened(tasks: Sequence[Task]) -> list[Task]:
    """The tasks until most micro-batches are in flight and a few more, and what ends these."""
    parted = {_key(task) for task in tasks if task.action is Action.BACKWARD_WEIGHT}
    alive: set[tuple[int, int]] = set()
    most = at = 0
    for i, task in enumerate(tasks):
        if task.action is Action.FORWARD:
            alive.add(_key(task))
            if len(alive) > most:
                most, at = len(alive), i
        elif task.action is not Action.BACKWARD_INPUT or _key(task) not in parted:
            alive.discard(_key(task))
    kept = list(tasks[: at + 1 + _STEADY])
    begun = {_key(task) for task in kept if task.action is Action.FORWARD}
    rest = tasks[len(kept) :]
    return kept + [t for t in rest if t.action is not Action.FORWARD and _key(t) in begun]


def _key(task: Task) -> tuple[int, int]:
    return task.stage, task.micro_batch


def _offloaded(saved: Sequence[int], sizes: Mapping[int, int], share: float) -> frozenset[int]:
    """The first saved tensors that make up the share."""
    wanted = share * sum(sizes[number] for number in saved)
    found: set[int] = set()
    for number in saved:
        if wanted <= 0:
            break
        found.add(number)
        wanted -= sizes[number]
    return frozenset(found)
