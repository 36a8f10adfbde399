"""One optimizer step: forward, loss, backward over micro-batches, clip, update."""

# Shapes: B samples, T tokens.

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plait.backend.jit import jit
from plait.models.decoder import Decoder
from plait.nn.token_layout import TokenLayout
from plait.ops.numerics import bfloat16_pays
from plait.train.job import Level
from plait.train.packing import Batch

Hidden = Callable[[Tensor, TokenLayout | None], Tensor]


@dataclass(frozen=True)
class StepResult:
    """loss: mean over the targets [nats]. grad_norm: before clipping."""

    loss: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        """Say whether both numbers are; if not, nothing was updated."""
        return (
            abs(self.loss) != float("inf")
            and self.loss == self.loss
            and self.grad_norm < float("inf")
        )


def hidden_of(model: Decoder, *, dtype: torch.dtype, level: Level) -> Hidden:
    """The model's hidden states (B, T, D), as PyTorch computes them or compiled at the first call.

    Products run in `dtype`.
    """

    def hidden(inputs_BT: Tensor, layout: TokenLayout | None) -> Tensor:
        with autocast(inputs_BT.device.type, dtype):
            return model(inputs_BT, layout)

    return hidden if level == "eager" else jit(hidden, level=level)


def summed_loss(
    model: Decoder,
    inputs_BT: Tensor,
    targets_BT: Tensor,
    *,
    dtype: torch.dtype,
    layout: TokenLayout | None = None,
) -> Tensor:
    """Sum the next-token losses [nats]; targets below 0 are left out, products run in `dtype`."""
    with autocast(inputs_BT.device.type, dtype):
        hidden_BTD = model(inputs_BT, layout)
    return model.loss(hidden_BTD, targets_BT, dtype=dtype)


def train_step(
    model: Decoder,
    hidden: Hidden,
    optimizers: Sequence[torch.optim.Optimizer],
    micro_batches: Iterable[Batch],
    *,
    num_targets: int,
    dtype: torch.dtype,
    clip_norm: float,
) -> StepResult:
    """Update the weights once, from the mean loss over `num_targets` targets in all micro-batches.

    hidden: of the model, by `hidden_of`. With a loss or gradient that is not finite nothing is
    updated, and the result says so.
    """
    losses = (
        model.loss(hidden(batch.inputs, batch.layout), batch.targets, dtype=dtype) / num_targets
        for batch in micro_batches
    )
    return update(model.parameters(), optimizers, losses, clip_norm=clip_norm)


def update(
    parameters: Iterable[nn.Parameter],
    optimizers: Sequence[torch.optim.Optimizer],
    losses: Iterable[Tensor],
    *,
    clip_norm: float,
) -> StepResult:
    """Update the parameters once, from the sum of some losses; each is freed before the next.

    With a loss or gradient that is not finite nothing is updated, and the result says so.
    """
    loss = 0.0
    for part in losses:
        part.backward()
        loss += part.item()
    grad_norm = nn.utils.clip_grad_norm_(parameters, clip_norm).item()
    result = StepResult(loss, grad_norm)
    for optimizer in optimizers:
        if result.is_finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return result


def autocast(device_type: str, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Run matrix products in `dtype` while the weights stay float32; float32 changes nothing."""
    return torch.autocast(device_type, dtype=dtype, enabled=dtype != torch.float32)


def notices(device: torch.device, dtype: torch.dtype, level: Level) -> Iterator[str]:
    """What to tell before the first step: products that are only emulated, a compilation."""
    if dtype == torch.bfloat16 and not bfloat16_pays(device.type):
        yield (
            "this processor has no bfloat16 instructions: its products take many times longer than "
            "those of float32. Better start again without --set dtype=bfloat16"
        )
    if level != "eager":
        yield f"compiling the first step at level {level}"
