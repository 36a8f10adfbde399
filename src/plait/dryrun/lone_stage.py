"""PyTorch's own pipelining on one rank, whose neighbours no process stands for.

A stage learns from its neighbours before the first step; a process group of the backend "fake"
tells it nothing.
"""

# pyright: basic
# (Schedules and stages are not typed.)

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._utils import InferenceMode
from torch.distributed.pipelining.schedules import _PipelineSchedule

from plait.errors import PlanError


@contextmanager
def lone_stages() -> Iterator[None]:
    """Let pipeline stages begin without neighbours.

    Stages first vote whether all were told the shapes of what they exchange, and ask each other
    where one was not. Here each must have been told. The first step raises PlanError if it was not.
    """
    before = _PipelineSchedule._warmup_p2p

    def begin(schedule: Any, stages: list[Any], has_backward: bool, p2p_done: bool) -> None:
        if not all(isinstance(stage, PipelineStage) for stage in stages):
            before(schedule, stages, has_backward, p2p_done)
            return
        for stage in stages:
            if InferenceMode.needs_dynamic(stage._user_meta, has_backward):
                raise PlanError(
                    f"pipeline stage {stage.stage_index} would ask its neighbours for shapes, and "
                    "a dry run has none. Give PipelineStage input_args and output_args; where "
                    "these are DTensors, input_grads and output_grads too."
                )
            stage._inference_mode = InferenceMode.STATIC

    _PipelineSchedule._warmup_p2p = begin  # type: ignore[method-assign]
    try:
        yield
    finally:
        _PipelineSchedule._warmup_p2p = before  # type: ignore[method-assign]
