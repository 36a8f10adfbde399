"""Stages of a pipeline for `dryrun_recipes`: PyTorch's own, in eager mode.

A stage is the model without what the other stages hold: what is missing hands on what it is given.
"""

# Shapes: b micro-batch, B batch, T tokens, D model width, V vocabulary.

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

Order = Literal["GPipe", "1F1B"]
_SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


class Missing(nn.Module):
    """Stands where another stage has a module."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the first argument."""
        return x


class Logits(nn.Module):
    """A model of transformers that returns its scores alone, (b, T, V)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (b, T), or what the stage before returns, to scores."""
        return self.model(x).logits


def keep_stage(model: Any, trunk: Any, stage: int, num_stages: int) -> list[nn.Module]:
    """Take out of a Llama what other stages hold: layers, and embedding or norm and head.

    trunk: the module with `embed_tokens`, `layers` and `norm`; model: that with `lm_head`. Returns
    the layers that it keeps, of which stages have equally many, or one more than others.
    """
    count = len(trunk.layers)
    kept = range(stage * count // num_stages, (stage + 1) * count // num_stages)
    layers = [trunk.layers[i] for i in kept]
    for i in range(count):
        if i not in kept:
            trunk.layers[i] = Missing()
    if stage > 0:
        trunk.embed_tokens = Missing()
    if stage < num_stages - 1:
        trunk.norm = model.lm_head = Missing()
    return layers


def pipeline_step(
    module: nn.Module,
    group: ProcessGroup,
    tokens_BT: Tensor,
    *,
    order: Order,
    num_micro_batches: int,
    width: int,
    dtype: torch.dtype,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[], None]:
    """A step of forward and backward on this rank's stage of a pipeline.

    width: D, of what stages exchange, in `dtype`. loss: of the last stage's result and the tokens,
    a mean. The stage is told the shapes, as a dry run of one rank has nobody to ask.
    """
    num_stages, stage_number = group.size(), group.rank()
    tokens_bT = tokens_BT.chunk(num_micro_batches)[0].to("meta")
    hidden_bTD = torch.empty(
        *tokens_bT.shape, width, dtype=dtype, device="meta", requires_grad=True
    )
    stage = PipelineStage(
        module,
        stage_number,
        num_stages,
        torch.device("cpu"),
        input_args=hidden_bTD if stage_number else tokens_bT,
        output_args=hidden_bTD,  # nobody reads that of the last stage
        group=group,
    )
    schedule = _SCHEDULES[order](stage, num_micro_batches, loss_fn=loss)

    def step() -> None:
        inputs = () if stage_number else (tokens_BT,)
        target = tokens_BT if stage.is_last else None
        schedule.step(*inputs, target=target, return_outputs=False)

    return step
