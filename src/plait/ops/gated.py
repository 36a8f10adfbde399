"""Gates of feed-forward layers: SwiGLU and GeGLU, f(gate) * up [Shazeer 2020, arXiv:2002.05202].

Computed in float32 (float64 for float64) and rounded once. The backward computes f(gate) again.
"""

# Shapes: M rows, F inner width.

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from plait.errors import ModelError
from plait.ops.fused_kernel import FusedKernel
from plait.ops.numerics import check_alike
from plait.ops.work import Work, pointwise_work, wide

Gate = Literal["silu", "gelu", "gelu_tanh"]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, contiguous. The halves of one tensor may be given (`chunk`)."""
    return _gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """Return gelu(gate) * up, contiguous; "tanh" is the approximation that Gemma takes."""
    return _gated(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def reference_gated(gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
    """The formula in the dtype of its operands."""
    if kind == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up


def gated_work(gate: Tensor) -> tuple[Work, Work]:
    """Forward and backward; an exponential or an error function counts as one."""
    return pointwise_work(5, gate, gate, gate, gate), pointwise_work(12, gate, *[gate] * 5)


def _gated(gate: Tensor, up: Tensor, kind: Gate) -> Tensor:
    check_alike("a gate", gate, up)
    if gate.shape != up.shape or gate.dim() < 1:
        raise ModelError(
            f"a gate needs two operands of one shape, got {tuple(gate.shape)} and "
            f"{tuple(up.shape)}."
        )
    rows = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
    return torch.ops.plait.gated(*rows, kind).view(gate.shape)


def _forward(gate_MF: Tensor, up_MF: Tensor, *, kind: Gate) -> tuple[Tensor]:
    return (reference_gated(wide(gate_MF), wide(up_MF), kind).to(gate_MF.dtype),)


def _gradients(
    dout_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, *, kind: Gate
) -> tuple[Tensor, Tensor]:
    dout, gate, up = wide(dout_MF), wide(gate_MF), wide(up_MF)
    if kind == "silu":
        sigmoid = torch.sigmoid(gate)
        value, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    elif kind == "gelu":
        normal = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
        density = torch.exp(-0.5 * gate * gate) * (1 / math.sqrt(2 * math.pi))
        value, slope = gate * normal, normal + gate * density
    else:  # 0.5 x (1 + tanh u), u = sqrt(2 / pi) (x + 0.044715 x^3) [Hendrycks & Gimpel 2016]
        factor = math.sqrt(2 / math.pi)
        tanh = torch.tanh(factor * (gate + 0.044715 * gate * gate * gate))
        slope_of_u = factor * (1 + 3 * 0.044715 * gate * gate)
        value = 0.5 * gate * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * slope_of_u
    return (dout * up * slope).to(gate_MF.dtype), (dout * value).to(up_MF.dtype)


_forward_kernel, _backward_kernel = FusedKernel(_forward), FusedKernel(_gradients)


@torch.library.custom_op("plait::gated", mutates_args=())
def _operator(gate_MF: Tensor, up_MF: Tensor, kind: str) -> Tensor:
    return _forward_kernel(gate_MF, up_MF, kind=kind)[0]


@_operator.register_fake
def _(gate_MF: Tensor, up_MF: Tensor, kind: str) -> Tensor:
    return gate_MF.new_empty(gate_MF.shape)


@torch.library.custom_op("plait::gated_backward", mutates_args=())
def _operator_backward(
    dout_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    dgate_MF, dup_MF = _backward_kernel(dout_MF, gate_MF, up_MF, kind=kind)
    return dgate_MF, dup_MF


@_operator_backward.register_fake
def _(dout_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return gate_MF.new_empty(gate_MF.shape), up_MF.new_empty(up_MF.shape)


def _save(ctx, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    gate_MF, up_MF, ctx.kind = inputs
    ctx.save_for_backward(gate_MF, up_MF)


def _backward(ctx, dout_MF: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.plait.gated_backward(dout_MF, *ctx.saved_tensors, ctx.kind), None


_operator.register_autograd(_backward, setup_context=_save)
