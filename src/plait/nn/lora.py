"""Low-rank adapters beside frozen linear layers [Hu et al. 2021, arXiv:2106.09685, eq. 3].

    y = x W^T + scale * (x A^T) B^T

The frozen matrix may be held in four bits (QLoRA). Parameters keep the names of the layer that is
replaced; `lora_A.weight` and `lora_B.weight` come beside, as PEFT calls them.
"""

# Shapes: I inputs, O outputs, r rank, X all leading dims of the input as one.

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from plait.errors import ModelError
from plait.ops.nf4 import Nf4, dequantize_nf4, nf4_linear, quantize_nf4
from plait.ops.numerics import autocast_inputs


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """rank and alpha: the update is scaled by alpha / rank, or alpha / sqrt(rank) if rank_stable.

    targets: ends of the names of the layers that get an adapter; empty = every linear layer but the
    output head. quantize: hold the frozen matrices in four bits.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ()
    rank_stable: bool = False
    quantize: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.rank < 1 or self.alpha <= 0:
            raise ModelError(
                f"LoRA needs rank >= 1 and alpha > 0, got {self.rank} and {self.alpha}."
            )

    @property
    def scale(self) -> float:
        """Factor on the update."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stable else self.rank)


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter."""

    weight_packed: Tensor
    weight_scales: Tensor
    weight_steps: Tensor
    weight_mean: Tensor

    def __init__(self, frozen: nn.Linear, settings: LoraSettings) -> None:
        """Take over the weight (O, I) of a layer; B starts at zero, so nothing changes at first."""
        super().__init__()
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.scale = settings.scale
        self.quantized = settings.quantize
        self.dtype = frozen.weight.dtype
        device = frozen.weight.device
        self.bias = frozen.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        if settings.quantize:
            matrix = quantize_nf4(frozen.weight)
            for name in ("packed", "scales", "steps", "mean"):
                self.register_buffer(f"weight_{name}", getattr(matrix, name), persistent=False)
        else:
            self.weight = frozen.weight
            self.weight.requires_grad_(False)
        self.lora_A = nn.Linear(self.in_features, settings.rank, bias=False, device=device)
        self.lora_B = nn.Linear(settings.rank, self.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as in the reference code
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        x, down_rI, up_Or = autocast_inputs(x, self.lora_A.weight, self.lora_B.weight)
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        # A base in half precision without autocast still has adapters in float32.
        down_rI, up_Or = down_rI.to(x.dtype), up_Or.to(x.dtype)
        if not self.quantized:
            return _Linear.apply(x, self.weight.to(x.dtype), bias, down_rI, up_Or, self.scale)
        frozen = nf4_linear(x, self._matrix(), self.out_features, bias)
        low_Xr = functional.linear(x, down_rI).flatten(0, -2)
        sum_XO = torch.addmm(frozen.flatten(0, -2), low_Xr, up_Or.T, alpha=self.scale)
        return sum_XO.view(frozen.shape)

    def frozen_weight(self) -> Tensor:
        """The matrix without its adapter, (O, I)."""
        if not self.quantized:
            return self.weight
        shape = torch.Size((self.out_features, self.in_features))
        return dequantize_nf4(self._matrix(), shape, self.dtype)

    def _matrix(self) -> Nf4:
        return Nf4(self.weight_packed, self.weight_scales, self.weight_steps, self.weight_mean)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One plain layer that computes the same, in the dtype of the frozen matrix."""
        update_OI = self.scale * (self.lora_B.weight.float() @ self.lora_A.weight.float())
        weight_OI = self.frozen_weight()
        layer = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device=weight_OI.device
        )
        layer.weight = nn.Parameter((weight_OI.float() + update_OI).to(weight_OI.dtype))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone())
        return layer


class _Linear(torch.autograd.Function):
    """A frozen product and its adapter. Backward adds the two gradients of x in one product."""

    @staticmethod
    def forward(ctx, x, weight_OI, bias, down_rI, up_Or, scale):
        x_XI = x.flatten(0, -2)
        frozen_XO = functional.linear(x_XI, weight_OI, bias)
        low_Xr = x_XI @ down_rI.T
        ctx.save_for_backward(x_XI, low_Xr, weight_OI, down_rI, up_Or)
        ctx.scale, ctx.shape = scale, x.shape
        sum_XO = torch.addmm(frozen_XO, low_Xr, up_Or.T, alpha=scale)
        return sum_XO.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx, *douts):
        x_XI, low_Xr, weight_OI, down_rI, up_Or = ctx.saved_tensors
        dout_XO = douts[0].flatten(0, -2)
        dlow_Xr = (dout_XO @ up_Or).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.addmm(dout_XO @ weight_OI, dlow_Xr, down_rI).view(ctx.shape)
        dup_Or = (dout_XO.T @ low_Xr).mul_(ctx.scale)
        return dx, None, None, dlow_Xr.T @ x_XI, dup_Or, None


def add_lora(
    model: nn.Module, settings: LoraSettings, generator: torch.Generator | None = None
) -> list[str]:
    """Freeze a model and give its linear layers adapters; returns their names.

    Raises ModelError if a target matches no layer.
    """
    names = _targets(model, settings.targets)
    model.requires_grad_(False)
    for name in names:
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        layer = LoraLinear(_linear(module, last), settings)
        if generator is not None:
            nn.init.kaiming_uniform_(layer.lora_A.weight, a=math.sqrt(5), generator=generator)
        setattr(module, last, layer)
    return names


def merge_lora(model: nn.Module) -> None:
    """Replace every adapted layer by a plain one that computes the same."""
    for name, layer in list(lora_layers(model)):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.merged())
    model.requires_grad_(True)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Adapted layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    layer = getattr(parent, name)
    assert isinstance(layer, nn.Linear), "_targets names linear layers only"
    return layer


def _targets(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    for target in targets:
        if not any(_matches(name, target) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear})
            raise ModelError(f"no linear layer is called {target!r}. Known: {', '.join(known)}.")
    return [name for name in linear if not targets or any(_matches(name, t) for t in targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
