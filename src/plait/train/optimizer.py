"""The optimizers of a run and their schedule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from plait.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW or Muon, and the schedule of their rate.

    kind "adamw" [Loshchilov & Hutter 2019] updates everything. kind "muon" [Jordan et al. 2024]
    updates the matrices inside the layers by orthogonalized momentum, scaled to the size of AdamW's
    steps [Liu et al. 2025, arXiv:2502.16982, section 2.2], all else by AdamW.

    The rate rises to `learning_rate` over `warmup_steps`, then falls to `final_fraction` of it: by
    a "cosine", in a straight line ("linear"), not at all ("constant"), or in a straight line over
    the last `decay_fraction` of all steps ("wsd": warm-up, stable, decay [Hu et al. 2024,
    arXiv:2404.06395, section 4]).
    Gradients are scaled down to a total norm of `clip_norm`. Matrices decay, vectors do
    not. Betas and epsilon are AdamW's, `momentum` is Muon's.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_fraction: float = 0.2
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_fraction: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.95
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
        if not 0 < self.decay_fraction <= 1:
            raise ConfigError("optimizer.decay_fraction lies in 0..1, 0 excluded.")
        if not all(0 <= value < 1 for value in (self.beta1, self.beta2, self.momentum)):
            raise ConfigError("optimizer.beta1, beta2 and momentum lie in 0..1, 1 excluded.")

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Rate of step number `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        match self.schedule:
            case "cosine":
                height = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
            case "linear":
                height = 1 - min(1.0, progress)
            case "constant":
                height = 1.0
            case "wsd":
                decay_steps = max(1.0, self.decay_fraction * num_steps)
                height = min(1.0, (num_steps - step) / decay_steps)
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * height)


def make_optimizers(model: nn.Module, settings: OptimizerSettings) -> list[Optimizer]:
    """Make PyTorch's optimizers; each parameter that learns belongs to one of them."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_muon = {
        name for name, p in named if settings.kind == "muon" and p.dim() == 2 and "layers." in name
    }
    rest = [p for name, p in named if name not in by_muon]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    rate = settings.learning_rate
    betas = (settings.beta1, settings.beta2)
    optimizers: list[Optimizer] = [
        AdamW(groups, lr=rate, betas=betas, eps=settings.epsilon, fused=True)
    ]
    if by_muon:
        optimizers.append(
            Muon(
                [p for name, p in named if name in by_muon],
                lr=rate,
                momentum=settings.momentum,
                weight_decay=settings.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return optimizers


def set_learning_rate(optimizers: Sequence[Optimizer], rate: float) -> None:
    """Give every group of every optimizer the same rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def optimizer_leaves(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Name the optimizers' tensors: "optimizer.<quantity>.<parameter>"."""
    return {
        f"optimizer.{quantity}.{name}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizers(
    model: nn.Module, optimizers: Sequence[Optimizer], leaves: dict[str, Tensor]
) -> None:
    """Undo `optimizer_leaves`."""
    parameters = dict(model.named_parameters())
    owner = {
        id(parameter): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for key, value in leaves.items():
        if key.startswith("optimizer."):
            _, quantity, name = key.split(".", 2)
            parameter = parameters[name]
            owner[id(parameter)].state[parameter][quantity] = value.to(parameter.device)
