"""When each operation runs, on streams that work side by side: plain data in, plain data out.

`list_schedule` finds an order, `simulate` plays a given one. Both compute in whole nanoseconds and
break ties by index, so equal operations give equal answers on every rank. Neither knows of graphs;
what an operation takes comes from `operations.py`, `collectives.py` or a profile.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush
from typing import Protocol

from plait.cost.timeline import Event, Stream, Timeline
from plait.errors import GraphError

COMPUTE = "compute"
_COMMUNICATION = "communication:"
_NANOSECONDS_PER_S = 1e9

Priority = tuple[float, ...]
"""Smaller goes first."""
FILLER: Priority = (float("inf"),)
"""For what runs only when nothing else can."""


def communication(group: str) -> str:
    """Name the stream of a process group's collectives, which run one after another."""
    return _COMMUNICATION + group


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. depends_on: indices of those that must end before it starts.

    stream: COMPUTE, or `communication(group)`. pinned_bytes: what it alone keeps alive from when it
    could run to when it has run: the operands of a weight gradient.
    """

    name: str
    stream: str
    duration_s: float
    depends_on: tuple[int, ...] = ()
    pinned_bytes: int = 0


class Host(Enum):
    """How operations are launched."""

    AHEAD = "ahead"
    """Streams wait for each other, the host for none, as on a GPU."""
    BLOCKING = "blocking"
    """The host computes itself, and waits for what an operation needs before it goes on."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Operations as they ran. start_s and end_s are by index, order is that of launching.

    exposed_s: time in which something is communicated and nothing computed.
    """

    operations: tuple[Operation, ...]
    order: tuple[int, ...]
    start_s: tuple[float, ...]
    end_s: tuple[float, ...]
    exposed_s: float

    @property
    def total_s(self) -> float:
        """When the last operation ends."""
        return max(self.end_s, default=0.0)

    @property
    def compute_s(self) -> float:
        """Sum of the durations of what computes, without slowdown."""
        return sum(each.duration_s for each in self.operations if each.stream == COMPUTE)

    @property
    def communication_s(self) -> float:
        """Sum of the durations of what communicates."""
        return sum(each.duration_s for each in self.operations if each.stream != COMPUTE)

    def timeline(self, program: str = "program") -> Timeline:
        """As what a profile measures: one event for each operation, in the order of launching."""
        return Timeline(
            tuple(
                Event(
                    name=self.operations[i].name,
                    operator=self.operations[i].name,
                    program=program,
                    start_s=self.start_s[i],
                    duration_s=self.end_s[i] - self.start_s[i],
                    stream=_kind(self.operations[i].stream),
                )
                for i in self.order
            )
        )


def simulate(
    operations: Sequence[Operation],
    order: Sequence[int],
    *,
    host: Host = Host.AHEAD,
    slowdown: float = 1.0,
) -> Simulation:
    """Play operations that are launched in this order; each stream keeps it.

    slowdown: how many times longer compute takes while something is communicated.
    Raises GraphError if the order is none, or if it waits for something that comes later.
    """
    if sorted(order) != list(range(len(operations))):
        raise GraphError(f"the order must name each of {len(operations)} operations once.")
    depends_on = [each.depends_on for each in operations]
    if host is Host.BLOCKING:
        depends_on = _with_host(operations, order)
    return _play(operations, depends_on, _InOrder(operations, order), slowdown, tuple(order))


def list_schedule(
    operations: Sequence[Operation],
    priority: Sequence[Priority],
    *,
    pinned_limit_bytes: int | None = None,
    slowdown: float = 1.0,
) -> Simulation:
    """Order operations greedily: a free stream takes the one that can run and has least priority.

    Where the operations that could run pin more than the limit, the first of those that pin goes
    next on its stream. In the order found, collectives stand as early as their operands and the
    queue of their group allow, so a host that computes itself need not wait to launch them.
    Raises GraphError if operations wait for each other in a circle.
    """
    if len(priority) != len(operations):
        raise GraphError(f"{len(operations)} operations, but {len(priority)} priorities.")
    choice = _ByPriority(operations, priority, pinned_limit_bytes)
    depends_on = [each.depends_on for each in operations]
    return _play(operations, depends_on, choice, slowdown, None)


def longest_paths_s(operations: Sequence[Operation]) -> list[float]:
    """Time from the start of each operation to the end of all that depends on it, on any stream.

    Negated, it is a priority: the critical path first. Operations must come after what they
    depend on.
    """
    paths_s = [each.duration_s for each in operations]
    after_s = [0.0] * len(operations)
    for i in reversed(range(len(operations))):
        paths_s[i] += after_s[i]
        for before in operations[i].depends_on:
            if before >= i:
                raise GraphError(f"{operations[i].name} comes before {operations[before].name}.")
            after_s[before] = max(after_s[before], paths_s[i])
    return paths_s


def beside_s(compute_s: float, message_s: float, interference: float) -> float:
    """Time of computation with a message beside it; compute is slower while it lasts."""
    covered_s = message_s / interference
    if covered_s >= compute_s:
        return max(message_s, compute_s)
    return message_s + compute_s - covered_s


class _Choice(Protocol):
    """What a free stream takes next."""

    def can_run(self, i: int) -> None:
        """Note that all that operation i depends on has ended."""
        ...

    def take(self, stream: str) -> int | None: ...


class _InOrder:
    def __init__(self, operations: Sequence[Operation], order: Sequence[int]) -> None:
        self.queues: dict[str, list[int]] = {}
        for i in reversed(order):
            self.queues.setdefault(operations[i].stream, []).append(i)
        self.is_ready = [False] * len(operations)

    def can_run(self, i: int) -> None:
        self.is_ready[i] = True

    def take(self, stream: str) -> int | None:
        queue = self.queues[stream]
        return queue.pop() if queue and self.is_ready[queue[-1]] else None


class _ByPriority:
    def __init__(
        self, operations: Sequence[Operation], priority: Sequence[Priority], limit: int | None
    ) -> None:
        self.operations, self.priority, self.limit = operations, priority, limit
        self.ready: dict[str, list[tuple[Priority, int]]] = {}
        self.pinning: dict[str, list[tuple[Priority, int]]] = {}
        self.taken: set[int] = set()  # of those that pin, which stand in two queues
        self.pinned_bytes = 0

    def can_run(self, i: int) -> None:
        each, entry = self.operations[i], (self.priority[i], i)
        heappush(self.ready.setdefault(each.stream, []), entry)
        if each.pinned_bytes:
            self.pinned_bytes += each.pinned_bytes
            heappush(self.pinning.setdefault(each.stream, []), entry)

    def take(self, stream: str) -> int | None:
        ready, pinning = self.ready.get(stream, []), self.pinning.get(stream, [])
        for queue in (ready, pinning):
            while queue and queue[0][1] in self.taken:
                heappop(queue)
        if not ready:
            return None
        is_over = self.limit is not None and self.pinned_bytes > self.limit
        _, i = heappop(pinning if is_over and pinning else ready)
        if self.operations[i].pinned_bytes:
            self.pinned_bytes -= self.operations[i].pinned_bytes
            self.taken.add(i)
        return i


def _play(
    operations: Sequence[Operation],
    depends_on: Sequence[Sequence[int]],
    choice: _Choice,
    slowdown: float,
    order: tuple[int, ...] | None,
) -> Simulation:
    """Let every free stream take what it can, go on to when the next operation ends, and again."""
    waits_for = [len(set(each)) for each in depends_on]
    users = _users(depends_on)
    for i in range(len(operations)):
        if not waits_for[i]:
            choice.can_run(i)
    left = [float(round(each.duration_s * _NANOSECONDS_PER_S)) for each in operations]
    start, end = [-1.0] * len(left), [-1.0] * len(left)
    streams = list(dict.fromkeys(each.stream for each in operations))
    running: dict[str, int] = {}
    started: list[int] = []
    now = exposed = 0.0
    while True:
        for stream in streams:
            if stream not in running and (i := choice.take(stream)) is not None:
                running[stream], start[i] = i, now
                started.append(i)
        if not running:
            break
        communicates = len(running) > (COMPUTE in running)
        rate = 1 / slowdown if communicates else 1.0
        step = min(left[i] / (rate if s == COMPUTE else 1) for s, i in running.items())
        now += step
        exposed += 0.0 if COMPUTE in running else step
        for stream, i in list(running.items()):
            left[i] -= step * (rate if stream == COMPUTE else 1)
            if left[i] < 1e-3:  # rounding of a slowed operation; a nanosecond is 1
                del running[stream]
                end[i] = now
                for user in users[i]:
                    waits_for[user] -= 1
                    if not waits_for[user]:
                        choice.can_run(user)
    _check_all_ran(operations, depends_on, end)
    return Simulation(
        operations=tuple(operations),
        order=order or _launch_order(operations, started),
        start_s=tuple(ns / _NANOSECONDS_PER_S for ns in start),
        end_s=tuple(ns / _NANOSECONDS_PER_S for ns in end),
        exposed_s=exposed / _NANOSECONDS_PER_S,
    )


def _users(depends_on: Sequence[Sequence[int]]) -> list[list[int]]:
    users: list[list[int]] = [[] for _ in depends_on]
    for i, before in enumerate(depends_on):
        for each in set(before):
            if not 0 <= each < len(depends_on):
                raise GraphError(f"operation {i} depends on {each}, of {len(depends_on)}.")
            users[each].append(i)
    return users


def _check_all_ran(
    operations: Sequence[Operation], depends_on: Sequence[Sequence[int]], end: Sequence[float]
) -> None:
    for i, each in enumerate(operations):
        if end[i] < 0:
            waits = [operations[k].name for k in depends_on[i] if end[k] < 0]
            raise GraphError(
                f"{each.name} never runs: it waits for {', '.join(waits) or 'its stream'}, which "
                "does not end. The order or the dependencies go in a circle."
            )


def _launch_order(operations: Sequence[Operation], started: Sequence[int]) -> tuple[int, ...]:
    """Compute as it started; each collective right after its operands and the one queued before."""
    slot = [0] * len(operations)  # how many computing operations are launched before it
    last: dict[str, int] = {}
    for i in started:
        stream = operations[i].stream
        if stream == COMPUTE:
            last[stream] = last.get(stream, 0) + 1
            slot[i] = last[stream]
            continue
        before = max((slot[k] for k in operations[i].depends_on), default=0)
        slot[i] = last[stream] = max(before, last.get(stream, 0))
    # The sort is stable: within a slot they stay in the order in which they started, but a
    # collective goes after the computing operation that makes its operand.
    return tuple(sorted(started, key=lambda i: (slot[i], operations[i].stream != COMPUTE)))


def _with_host(operations: Sequence[Operation], order: Sequence[int]) -> list[tuple[int, ...]]:
    """Dependencies, and what the host has waited for before it launches the operation."""
    depends_on = [each.depends_on for each in operations]
    waited: tuple[int, ...] = ()
    for i in order:
        own = depends_on[i]
        depends_on[i] = own + waited
        # Later operations wait for what this one did; of a computing one, its end says it all.
        waited = (i,) if operations[i].stream == COMPUTE else waited + own
    return depends_on


def _kind(stream: str) -> Stream:
    return Stream.COMPUTE if stream == COMPUTE else Stream.COMMUNICATION
