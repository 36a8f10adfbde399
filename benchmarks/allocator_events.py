"""Memory as PyTorch's CPU allocator reports it to the profiler: the truth of the dry run.

`c10::ProfiledCPUMemoryReporter` tells the profiler of every allocation and every free, with address
and size. Nothing here knows of graphs, tensors or schedules.

The reporter's own running total is not used: it misses frees of threads that are not profiled
[c10/core/CPUAllocator.cpp, ProfiledCPUMemoryReporter::Delete], and such are gloo's, when a thread
is the last to let go of a message (`ProcessGroupGloo::runLoop` keeps the work until it has the
queue's lock again). The total then stays too large for good. So blocks are kept by address: where a
new one overlaps an old one, the old one was freed, and nobody said so. `reuse_addresses` makes the
C library give addresses out again soon.
"""

import ctypes
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

_MMAP_THRESHOLD, _ARENA_MAX = -3, -8  # of mallopt [glibc, malloc/malloc.h]
_MAPPED_BYTES = 2**16


@dataclass(frozen=True)
class Change:
    """An allocation, or with negative num_bytes a free."""

    time_ns: int
    address: int
    num_bytes: int


@dataclass(frozen=True)
class Allocations:
    """Allocated bytes after each change: (time in ns, bytes), in order; and marks set meanwhile.

    unseen: (time in ns at which it was found, bytes) of each free that no thread reported.
    """

    totals: list[tuple[int, int]]
    operators: list[tuple[int, int, str]]
    marks: dict[str, int]
    unseen: list[tuple[int, int]]

    def at(self, mark: str) -> int:
        """The total at a mark."""
        return next((x for time, x in reversed(self.totals) if time <= self.marks[mark]), 0)

    def peak(self, start: str, end: str) -> int:
        """The largest total between two marks."""
        begin, stop = self.marks[start], self.marks[end]
        return max([self.at(start), *(x for time, x in self.totals if begin < time <= stop)])


@dataclass
class Blocks:
    """What is allocated, by address."""

    sizes: dict[int, int] = field(default_factory=dict[int, int])
    addresses: list[int] = field(default_factory=list[int])
    total: int = 0

    def apply(self, change: Change) -> int:
        """Do a change; returns the bytes that it shows to have been freed without a word."""
        if change.num_bytes < 0:
            if change.address in self.sizes:
                self._remove(change.address)
            return 0
        unseen = 0
        i = bisect_left(self.addresses, change.address)
        if i and self.addresses[i - 1] + self.sizes[self.addresses[i - 1]] > change.address:
            unseen += self._remove(self.addresses[i - 1])
            i -= 1
        end = change.address + change.num_bytes
        while i < len(self.addresses) and self.addresses[i] < end:
            unseen += self._remove(self.addresses[i])
        insort(self.addresses, change.address)
        self.sizes[change.address] = change.num_bytes
        self.total += change.num_bytes
        return unseen

    def _remove(self, address: int) -> int:
        size = self.sizes.pop(address)
        self.addresses.pop(bisect_left(self.addresses, address))
        self.total -= size
        return size


def reuse_addresses() -> None:
    """Let each large block be a mapping of its own: when it is freed, the next takes its place.

    What is asked for stays the same; only where it lies changes. Raises OSError without glibc.
    """
    mallopt = ctypes.CDLL("libc.so.6").mallopt
    for setting, value in ((_MMAP_THRESHOLD, _MAPPED_BYTES), (_ARENA_MAX, 1)):
        if not mallopt(setting, value):
            raise OSError(f"mallopt({setting}, {value}) was refused.")


def record(run: Callable[[Callable[[str], None]], None]) -> Allocations:
    """Run from a clean process; `run` is given a function that marks a moment with a name."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:

        def mark(name: str) -> None:
            with torch.profiler.record_function(f"mark:{name}"):
                pass

        run(mark)
    kineto = profiler.profiler.kineto_results
    changes: list[Change] = []
    operators, marks = [], {}
    stack = list(reversed(kineto.experimental_event_tree()))
    while stack:
        event = stack.pop()
        stack.extend(reversed(event.children))
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            changes.append(Change(event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name.startswith("mark:"):
            marks[event.name.removeprefix("mark:")] = event.start_time_ns
        else:
            operators.append((event.start_time_ns, event.end_time_ns, event.name))
    changes.sort(key=lambda each: each.time_ns)
    totals, unseen = totals_of(changes)
    return Allocations(totals, sorted(operators), marks, unseen)


def totals_of(changes: list[Change]) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The total after each change, and the frees that nobody reported, each with its time."""
    blocks = Blocks()
    totals: list[tuple[int, int]] = []
    unseen: list[tuple[int, int]] = []
    for change in changes:
        found = blocks.apply(change)
        if found:
            unseen.append((change.time_ns, found))
        totals.append((change.time_ns, blocks.total))
    return totals, unseen
