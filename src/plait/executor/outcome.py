"""What a differentiable function gives: its outputs, and the gradients of what it was given."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plait.executor.observe import tensors_in


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """gradients: by name, for what requires a gradient and has influence."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """Every tensor, as "output 0" or "gradient of weight"."""
        outputs = {f"output {i}": x for i, x in enumerate(self.outputs)}
        return outputs | {f"gradient of {name}": x for name, x in self.gradients.items()}


def outcome_of(
    function: Callable[..., object],
    inputs: Sequence[object],
    *,
    parameters: Mapping[str, Tensor] | None = None,
    tangents: Sequence[Tensor] | None = None,
) -> Outcome:
    """Run forward, and backward from the outputs that require gradients.

    tangents: one for each of those outputs; ones if None. `.grad` is left alone.
    """
    outputs = tensors_in(function(*inputs))
    leaves = {f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    leaves |= parameters or {}
    leaves = {name: x for name, x in leaves.items() if x.requires_grad}
    ends = [x for x in outputs if x.requires_grad]
    gradients: dict[str, Tensor] = {}
    if leaves and ends:
        arriving = [torch.ones_like(x) for x in ends] if tangents is None else list(tangents)
        found = torch.autograd.grad(ends, list(leaves.values()), arriving, allow_unused=True)
        pairs = zip(leaves, found, strict=True)
        gradients = {name: x for name, x in pairs if x is not None}
    return Outcome(outputs=tuple(x.detach() for x in outputs), gradients=gradients)
