"""AdamW with its schedule."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from plait.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW [Loshchilov & Hutter 2019] under a cosine schedule with linear warm-up.

    The rate rises to `learning_rate` over `warmup_steps`, then falls to `final_fraction` of it at
    the last step. Gradients are scaled down to a total norm of `clip_norm`. Matrices decay, vectors
    do not.
    """

    learning_rate: float = 3e-3
    warmup_steps: int = 100
    final_fraction: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.learning_rate <= 0 or self.clip_norm <= 0 or self.epsilon <= 0:
            raise ConfigError("optimizer.learning_rate, clip_norm and epsilon must be positive.")
        if self.warmup_steps < 0 or self.weight_decay < 0 or not 0 <= self.final_fraction <= 1:
            raise ConfigError(
                "optimizer.warmup_steps and weight_decay must not be negative, "
                "final_fraction lies in 0..1."
            )
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError("optimizer.beta1 and beta2 lie in 0..1, 1 excluded.")

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Rate of step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """Make the fused AdamW of PyTorch over all parameters."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon, fused=True
    )


def optimizer_leaves(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Name the optimizer's tensors: "optimizer.<quantity>.<parameter>"."""
    return {
        f"optimizer.{quantity}.{name}": value
        for name, parameter in model.named_parameters()
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, leaves: dict[str, torch.Tensor]
) -> None:
    """Undo `optimizer_leaves`."""
    parameters = dict(model.named_parameters())
    for key, value in leaves.items():
        kind, quantity, name = key.split(".", 2)
        if kind == "optimizer":
            optimizer.state[parameters[name]][quantity] = value
