"""Level O2 on a GPU: a step of training, forward and backward, as one replay of a CUDA graph.

A replay reads and writes the memory that was there when the graph was recorded: inputs are copied
to where the first ones were, parameters may change in place between replays, and the gradients lie
where the next replay writes them.
"""

# pyright: basic
# (CUDA graphs are not typed.)

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.graph.graph import Role
from plait.graph.schedule import ISLAND, Schedule

WARM_UP_STEPS = 3
"""Before a recording: kernels are chosen and workspaces made in the first steps [PyTorch, notes on
CUDA graphs]."""

Step = Callable[[Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]
"""From the inputs of the schedule to the loss and the gradients."""


def can_replay(schedule: Schedule) -> bool:
    """Whether a step is one recording: level O2, whole programs, one GPU, one micro-batch."""
    programs = (schedule.programs.get(name) for name in ("forward", "backward"))
    is_whole = all(
        program is not None and any(step.target.startswith(ISLAND) for step in program.steps)
        for program in programs
    )
    on_gpu = bool(schedule.inputs) and all(v.device.startswith("cuda") for v in schedule.inputs)
    changes_inputs = any(value.role is Role.UPDATE for value in schedule.outputs)
    is_alone = not schedule.groups and schedule.num_micro_batches == 1 and not changes_inputs
    return schedule.level == "O2" and schedule.is_step and is_whole and on_gpu and is_alone


@dataclass
class Replay:
    """A recorded step, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    loss: Tensor
    gradients: list[Tensor]
    addresses: list[int]

    def fits(self, owners: Sequence[Tensor], is_fixed: Sequence[bool]) -> bool:
        """Whether parameters and buffers still lie where they lay."""
        now = [x.data_ptr() for x, fixed in zip(owners, is_fixed, strict=True) if fixed]
        return now == self.addresses

    def run(self, owners: Sequence[Tensor], is_fixed: Sequence[bool]) -> Tensor:
        """Replay it with these inputs; the gradients are in `gradients` until the next replay."""
        for place, x, fixed in zip(self.inputs, owners, is_fixed, strict=True):
            if not fixed:
                place.copy_(x)
        self.graph.replay()
        return self.loss.clone()


@torch.no_grad()
def record(step: Step, owners: Sequence[Tensor], is_fixed: Sequence[bool]) -> Replay:
    """Record a step. is_fixed: the inputs that are parameters and buffers, which are not copied."""
    inputs = [x if fixed else x.clone() for x, fixed in zip(owners, is_fixed, strict=True)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradients = step(inputs)
    addresses = [x.data_ptr() for x, fixed in zip(owners, is_fixed, strict=True) if fixed]
    return Replay(graph, inputs, loss, list(gradients), addresses)


def keep_apart(owners: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Before a replay: move a gradient that is still wanted out of the memory it will write."""
    written = {id(x) for x in gradients}
    for owner in owners:
        if owner.grad is not None and id(owner.grad) in written:
            owner.grad = owner.grad.clone()
