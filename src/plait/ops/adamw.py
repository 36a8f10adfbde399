"""One step of AdamW over many parameters.

The kernel is PyTorch's `_fused_adamw_`, on a CPU and on a GPU: one pass over parameter, gradient
and both moments. No other kernel was tried against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.ops.work import Work, num_bytes


@dataclass(frozen=True, kw_only=True)
class AdamWSettings:
    """Of one step [Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2]."""

    learning_rate: float
    beta_1: float = 0.9
    beta_2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0


def adamw_step_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    settings: AdamWSettings,
) -> None:
    """Update parameters, both moments and the counts of steps in place.

    steps: a float32 scalar for each parameter, how many steps were taken before. Raises ModelError
    where the lists do not belong together.
    """
    _check(parameters, gradients, means, squares, steps)
    with torch.no_grad():
        torch.ops.aten._foreach_add_.Scalar(list(steps), 1.0)
        torch.ops.aten._fused_adamw_(
            list(parameters),
            list(gradients),
            list(means),
            list(squares),
            [],
            list(steps),
            lr=settings.learning_rate,
            beta1=settings.beta_1,
            beta2=settings.beta_2,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
            amsgrad=False,
            maximize=False,
        )


def reference_adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    settings: AdamWSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's lines for one parameter, after `step` steps: parameter and moments, new."""
    mean = settings.beta_1 * mean + (1 - settings.beta_1) * gradient
    square = settings.beta_2 * square + (1 - settings.beta_2) * gradient**2
    unbiased_mean = mean / (1 - settings.beta_1 ** (step + 1))
    unbiased_square = square / (1 - settings.beta_2 ** (step + 1))
    change = unbiased_mean / (unbiased_square.sqrt() + settings.eps)
    parameter = parameter * (1 - settings.learning_rate * settings.weight_decay)
    return parameter - settings.learning_rate * change, mean, square


def adamw_work(parameters: Sequence[Tensor]) -> Work:
    """Four tensors of the parameters' form are read, three written."""
    return Work(flops=14 * sum(p.numel() for p in parameters), bytes=7 * num_bytes(*parameters))


def _check(parameters: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    lengths = [len(parameters), *(len(tensors) for tensors in others)]
    if len(set(lengths)) > 1:
        raise ModelError(f"adamw_step_ needs lists of one length, got {lengths}.")
    for i, tensors in enumerate(zip(parameters, *others[:-1], strict=True)):
        shapes = [tuple(t.shape) for t in tensors]
        if len(set(shapes)) > 1 or not tensors[0].dtype.is_floating_point:
            raise ModelError(
                f"adamw_step_ needs a gradient and moments of the parameter's shape; number {i} "
                f"has {shapes} and {tensors[0].dtype}."
            )
