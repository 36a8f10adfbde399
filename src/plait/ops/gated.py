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
from plait.ops.fused_kernel import CppKernel, FusedKernel, rows_of
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
    result_MF = torch.ops.plait.gated(rows_of(gate), rows_of(up), kind)
    return result_MF if gate.dim() == 2 else result_MF.view(gate.shape)


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
# Inductor's error function and hyperbolic tangent take longer than the exponential both rest on.
_gelu_kernel = CppKernel(
    _forward,
    r"""
struct gelu {  // the normal distribution by Abramowitz & Stegun 1964, 7.1.26
  static inline void at(float x, float* value, float* slope) {
    const float e = exponential(-0.5f * x * x);
    const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * (x < 0 ? -x : x));
    float p = 1.061405429f;
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const float tail = 0.5f * p * t * e, normal = x < 0 ? tail : 1.0f - tail;
    *value = x * normal;
    *slope = normal + x * e * 0.39894228f;
  }
};
struct gelu_tanh {  // 0.5 (1 + tanh u) is the sigmoid of 2 u
  static inline void at(float x, float* value, float* slope) {
    const float c = 1.59576912f;
    const float s = 1.0f / (1.0f + exponential(-c * (x + 0.044715f * x * x * x)));
    *value = x * s;
    *slope = s + x * s * (1.0f - s) * c * (1.0f + 0.134145f * x * x);
  }
};
template <typename F, typename T>
static void forward(const T* gate, const T* up, T* out, int64_t M, int64_t N, int64_t gate_stride,
                    int64_t up_stride) {
#pragma omp parallel for schedule(static)
  for (int64_t m = 0; m < M; ++m) {
    const T *g = gate + m * gate_stride, *u = up + m * up_stride;
    T* __restrict o = out + m * N;
#pragma omp simd
    for (int64_t n = 0; n < N; ++n) {
      float value, slope;
      F::at(wide(g[n]), &value, &slope);
      narrow(value * wide(u[n]), o + n);
    }
  }
}
template <typename F, typename T>
static void backward(const T* gate, const T* up, const T* dout, T* dgate, T* dup, int64_t M,
                     int64_t N, int64_t gate_stride, int64_t up_stride) {
#pragma omp parallel for schedule(static)
  for (int64_t m = 0; m < M; ++m) {
    const T *g = gate + m * gate_stride, *u = up + m * up_stride, *d = dout + m * N;
    T *__restrict dg = dgate + m * N, *__restrict du = dup + m * N;
#pragma omp simd
    for (int64_t n = 0; n < N; ++n) {
      float value, slope;
      F::at(wide(g[n]), &value, &slope);
      const float dn = wide(d[n]);
      narrow(dn * wide(u[n]) * slope, dg + n);
      narrow(dn * value, du + n);
    }
  }
}
#define DEFINE(KIND, NAME, T)                                                                   \
  extern "C" void KIND##_##NAME(const T* g, const T* u, T* o, int64_t M, int64_t N, int64_t gs, \
                                int64_t us, double) {                                           \
    forward<KIND, T>(g, u, o, M, N, gs, us);                                                    \
  }                                                                                             \
  extern "C" void KIND##_backward_##NAME(const T* g, const T* u, const T* d, T* dg, T* du,      \
                                         int64_t M, int64_t N, int64_t gs, int64_t us,          \
                                         double) {                                              \
    backward<KIND, T>(g, u, d, dg, du, M, N, gs, us);                                           \
  }
DEFINE(gelu, float32, float)
DEFINE(gelu, bfloat16, uint16_t)
DEFINE(gelu_tanh, float32, float)
DEFINE(gelu_tanh, bfloat16, uint16_t)
""",
)


def _in_rows(x_MF: Tensor) -> Tensor:
    return x_MF if x_MF.stride(-1) == 1 else x_MF.contiguous()


@torch.library.custom_op("plait::gated", mutates_args=())
def _operator(gate_MF: Tensor, up_MF: Tensor, kind: str) -> Tensor:
    if kind != "silu" and _gelu_kernel.takes(gate_MF):
        gate_MF, up_MF = _in_rows(gate_MF), _in_rows(up_MF)
        result_MF = gate_MF.new_empty(gate_MF.shape)
        sizes = (*gate_MF.shape, gate_MF.stride(0), up_MF.stride(0))
        if _gelu_kernel.run(kind, (gate_MF, up_MF, result_MF), sizes, dtype=gate_MF.dtype):
            return result_MF
    return _forward_kernel(gate_MF, up_MF, kind=kind)[0]


@_operator.register_fake
def _(gate_MF: Tensor, up_MF: Tensor, kind: str) -> Tensor:
    return gate_MF.new_empty(gate_MF.shape)


@torch.library.custom_op("plait::gated_backward", mutates_args=())
def _operator_backward(
    dout_MF: Tensor, gate_MF: Tensor, up_MF: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    if kind != "silu" and _gelu_kernel.takes(gate_MF):
        gate_MF, up_MF = _in_rows(gate_MF), _in_rows(up_MF)
        dgate_MF, dup_MF = (gate_MF.new_empty(gate_MF.shape) for _ in range(2))
        tensors = (gate_MF, up_MF, dout_MF.contiguous(), dgate_MF, dup_MF)
        sizes = (*gate_MF.shape, gate_MF.stride(0), up_MF.stride(0))
        if _gelu_kernel.run(f"{kind}_backward", tensors, sizes, dtype=gate_MF.dtype):
            return dgate_MF, dup_MF
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
