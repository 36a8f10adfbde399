"""A training step of eager PyTorch, priced in memory: it runs on fake tensors, as it is.

FSDP2, DTensor, pipeline stages, activation checkpointing and optimizers are the user's own; with a
process group of the backend "fake" (`graph/plan_mesh.py`) one process stands for any rank of many.
"""

# pyright: basic
# (Hooks and optimizers' states are not typed.)

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from plait.dryrun.lone_stage import lone_stages
from plait.dryrun.memory_trace import Kind, MemoryTrace
from plait.dryrun.watch_memory import EagerMemory
from plait.dryrun.workspace import Workspace
from plait.errors import PlanError


@dataclass(frozen=True)
class EagerProgram:
    """What does one training step, and what it trains: these are told apart in the ledger."""

    step: Callable[[], object]
    model: nn.Module | None = None
    optimizer: Optimizer | None = None


@dataclass(frozen=True)
class EagerRun:
    """Memory of eager steps, and the moment at which each began."""

    trace: MemoryTrace
    begins: tuple[int, ...]


def trace_eager(
    build: Callable[[], EagerProgram],
    num_steps: int = 2,
    *,
    num_threads: int = 1,
    with_sources: bool = False,
) -> EagerRun:
    """Note the memory of eager steps, without data.

    build: makes model, optimizer and inputs; all of it runs on fake tensors. The second step, when
    the optimizer's state exists, is like all later ones. with_sources: note the user's line of each
    allocation; that takes longer. A value that the program looks at is 1.0, or False. Raises
    PlanError for a pipeline stage that was not told the shapes of what it exchanges.
    """
    if num_steps < 1:
        raise PlanError(f"num_steps={num_steps}: at least one step is needed.")
    begins: list[int] = []
    with (
        _unnoticed(),
        lone_stages(),
        FakeTensorMode(),
        EagerMemory(Workspace(num_threads), with_sources=with_sources) as watch,
    ):
        program = build()
        parameters = dict(program.model.named_parameters()) if program.model is not None else {}
        watch.mark(parameters.values(), Kind.PARAMETERS, list(parameters))
        if program.model is not None:
            watch.mark(program.model.buffers(), Kind.PARAMETERS)
        for parameter in parameters.values():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: watch.mark([p.grad], Kind.GRADIENTS)
                )
        for _ in range(num_steps):
            begins.append(watch.moment + 1)
            program.step()
            if program.optimizer is not None:
                states = program.optimizer.state.values()
                watch.mark([x for state in states for x in state.values()], Kind.OPTIMIZER)
    return EagerRun(watch.trace, tuple(begins))


@contextmanager
def _unnoticed() -> Iterator[None]:
    """Let transformers take the way that it takes with real tensors.

    It looks whether tensors are fake, and then makes masks that a real run does without.
    """
    module: Any = sys.modules.get("transformers.utils.import_utils")
    if module is None:
        yield
        return
    before = module.is_fake_tensor
    module.is_fake_tensor = lambda x: False
    try:
        yield
    finally:
        module.is_fake_tensor = before
