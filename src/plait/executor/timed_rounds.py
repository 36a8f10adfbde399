"""Programs of a step, timed in turns, forward and backward apart.

A program is a function that runs a step and says what its forward and its backward took. Each has
a twin, the same program with free communication.
"""

# pyright: basic
# (Inputs of programs are not typed.)

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.cost.clusters import Link
from plait.cost.overlap import OverlapTimes
from plait.executor.delayed_process_group import DelayedProcessGroup
from plait.executor.run import Runnable
from plait.graph.graph import Role
from plait.graph.schedule import Schedule

FREE = " free"
"""What the name of a twin ends with."""

Seconds = dict[str, float]
"""By direction."""
Step = Callable[[], Seconds]


@dataclass(frozen=True)
class Samples:
    """Rounds of all programs. by_name: for each program what each round took, by direction."""

    by_name: dict[str, list[Seconds]]

    def of(self, name: str, direction: str) -> list[float]:
        """What a direction of a program took, round by round."""
        return [each[direction] for each in self.by_name[name]]

    def median_s(self, name: str, direction: str) -> float:
        """The median of that."""
        return statistics.median(self.of(name, direction))


def example_inputs(schedule: Schedule, *, vocab_size: int, seed: int = 0) -> list[Tensor]:
    """Small random weights, ones for vectors such as norms, tokens of a vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    made: list[Tensor] = []
    for value in schedule.inputs:
        if value.role is Role.TANGENT:
            continue
        if value.dtype is None or not value.dtype.is_floating_point:
            x = torch.randint(0, vocab_size, value.shape, generator=generator)
        elif len(value.shape) < 2:
            x = torch.ones(value.shape)
        else:
            x = torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5
        made.append(x.to(value.device, value.dtype))
        made[-1].requires_grad_(value.role is Role.PARAMETER)
    return made


def timed_step(runnable: Runnable, inputs: Sequence[Tensor]) -> Seconds:
    """Run forward and backward of a step, and say what each took, on its device too."""
    assert runnable.backward is not None
    finish = torch.cuda.synchronize if any(x.is_cuda for x in inputs) else lambda: None
    with torch.no_grad():
        finish()
        began_s = time.perf_counter()
        yielded = runnable.forward(list(inputs))
        finish()
        forward_s = time.perf_counter() - began_s
        results = yielded[: runnable.num_results]
        box = runnable.saved(inputs, yielded[runnable.num_results :])
        box += [torch.ones_like(results[i]) for i, _ in runnable.tangents]
        del yielded, results
        began_s = time.perf_counter()
        runnable.backward(box)
        finish()
        return {"forward": forward_s, "backward": time.perf_counter() - began_s}


def measure_rounds(
    programs: Mapping[str, Step], num_rounds: int, on_round: Callable[[int], None] = lambda i: None
) -> Samples:
    """Run all programs in turns: once to warm up, then a round forwards, a round backwards, ...

    Each round sees one state of the machine, so figures of one round may be compared.
    """
    for step in programs.values():
        step()
    found: dict[str, list[Seconds]] = {name: [] for name in programs}
    for i in range(num_rounds):
        on_round(i)
        names = list(programs)
        for name in names if i % 2 == 0 else reversed(names):
            found[name].append(programs[name]())
    return Samples(found)


def with_twin(
    name: str, step: Step, group: DelayedProcessGroup, link: Link | None = None
) -> dict[str, Step]:
    """A program, and its twin with free communication, named "... free"."""

    def run(scale: float) -> Seconds:
        group.scale, group.link = scale, link or group.link
        group.transfers.clear()
        return step()

    return {name: lambda: run(1.0), name + FREE: lambda: run(0.0)}


def times_of(
    samples: Samples, num_replicas: int, names: Sequence[str], direction: str
) -> OverlapTimes:
    """Medians, for the report. names: of unsplit, split and overlapped, measured with twins."""
    unsplit, split, overlapped = names
    return OverlapTimes(
        num_replicas=num_replicas,
        unsplit_s=samples.median_s(unsplit, direction),
        split_s=samples.median_s(split, direction),
        overlapped_s=samples.median_s(overlapped, direction),
        free_s=samples.median_s(unsplit + FREE, direction),
        split_free_s=samples.median_s(split + FREE, direction),
    )


def net_hidden(samples: Samples, unsplit: str, overlapped: str, direction: str) -> list[float]:
    """(T0 - To) / (T0 - Tn0) of each round; the communication time is the median of all rounds."""
    rounds = zip(
        samples.of(unsplit, direction),
        samples.of(overlapped, direction),
        strict=True,
    )
    communication_s = statistics.median(
        whole_s - free_s
        for whole_s, free_s in zip(
            samples.of(unsplit, direction), samples.of(unsplit + FREE, direction), strict=True
        )
    )
    return [(unsplit_s - overlapped_s) / communication_s for unsplit_s, overlapped_s in rounds]
