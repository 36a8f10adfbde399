"""Memory as PyTorch's CPU allocator reports it to the profiler: the truth of the dry run.

`c10::ProfiledCPUMemoryReporter` tells the profiler of every allocation and every free, with the
total of what is allocated. Nothing here knows of graphs, tensors or schedules.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocations:
    """(time in ns, bytes of the change, total afterwards), in order; and marks set meanwhile."""

    events: list[tuple[int, int, int]]
    operators: list[tuple[int, int, str]]
    marks: dict[str, int]

    def peak(self, start: str, end: str) -> int:
        """The largest total between two marks."""
        begin, stop = self.marks[start], self.marks[end]
        before = [total for time, _, total in self.events if time <= begin][-1:]
        within = [total for time, _, total in self.events if begin < time <= stop]
        return max(before + within)


def record(run: Callable[[Callable[[str], None]], None]) -> Allocations:
    """Run from a clean process; `run` is given a function that marks a moment with a name."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:

        def mark(name: str) -> None:
            with torch.profiler.record_function(f"mark:{name}"):
                pass

        run(mark)
    kineto = profiler.profiler.kineto_results
    events, operators, marks = [], [], {}
    stack = list(kineto.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            events.append((event.start_time_ns, fields.alloc_size, fields.total_allocated))
        elif event.name.startswith("mark:"):
            marks[event.name.removeprefix("mark:")] = event.start_time_ns
        else:
            operators.append((event.start_time_ns, event.end_time_ns, event.name))
    # Events of one nanosecond stay in the order of the total: no two changes are equal in time.
    events.sort(key=lambda each: each[0])
    return Allocations(events, sorted(operators), marks)
