"""Layer norm [Ba et al. 2016, arXiv:1607.06450, eq. 3], forward and backward.

On a CPU each is one pass over the rows in C++, which also sums the gradients of weight and bias;
elsewhere, and in other dtypes, PyTorch's kernels. Statistics are of at least float32.
"""

# Shapes: M rows, D width.

import torch
from torch import Tensor
from torch.nn import functional

from plait.errors import ModelError
from plait.ops.fused_kernel import CppKernel, rows_of
from plait.ops.numerics import check_alike
from plait.ops.work import Work, pointwise_work, wide


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None = None, *, eps: float) -> Tensor:
    """Normalize rows (last dim) by mean and variance, then scale and shift.

    Raises ModelError where weight or bias does not fit, or dtypes or devices differ.
    """
    given = [t for t in (x, weight_D, bias_D) if t is not None]
    check_alike("layer_norm", *given)
    if x.dim() < 1 or any(t.shape != x.shape[-1:] for t in given[1:]):
        shapes = [tuple(t.shape) for t in given[1:]]
        raise ModelError(
            f"layer_norm of {tuple(x.shape)} needs weight and bias of its last dim alone, "
            f"got {shapes}."
        )
    if not _kernel.takes(x):
        return functional.layer_norm(x, x.shape[-1:], weight_D, bias_D, eps)
    normed_MD, _, _ = torch.ops.plait.layer_norm(rows_of(x), weight_D, bias_D, eps)
    return normed_MD if x.dim() == 2 else normed_MD.view(x.shape)


def reference_layer_norm(
    x: Tensor, weight_D: Tensor, bias_D: Tensor | None = None, *, eps: float
) -> Tensor:
    """The formula in the dtype of its operands."""
    centered = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    scaled = centered * scale * weight_D
    return scaled if bias_D is None else scaled + bias_D


def layer_norm_work(x: Tensor, weight_D: Tensor) -> tuple[Work, Work]:
    """Forward and backward; weight and bias are alike."""
    forward = pointwise_work(7, x, x, x, weight_D, weight_D)
    return forward, pointwise_work(12, x, x, x, x, weight_D, weight_D, weight_D)


def _normed(
    x_MD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = wide(x_MD)
    mean_M = x.mean(-1)
    centered = x - mean_M[:, None]
    scale_M = torch.rsqrt(centered.square().mean(-1) + eps)
    normed = centered * scale_M[:, None] * wide(weight_D)
    normed = normed if bias_D is None else normed + wide(bias_D)
    return normed.to(x_MD.dtype), mean_M, scale_M


def _gradients(
    dnormed_MD: Tensor, x_MD: Tensor, mean_M: Tensor, scale_M: Tensor, weight_D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dnormed, unit = wide(dnormed_MD), (wide(x_MD) - mean_M[:, None]) * scale_M[:, None]
    dunit = dnormed * wide(weight_D)
    first, second = (t.mean(-1, keepdim=True) for t in (dunit, dunit * unit))
    dx_MD = (dunit - first - unit * second) * scale_M[:, None]
    sums = (dnormed * unit).sum(0), dnormed.sum(0)
    return dx_MD.to(x_MD.dtype), *(each.to(weight_D.dtype) for each in sums)


_kernel = CppKernel(
    _normed,
    r"""
#include <cmath>
template <typename T>
static void forward(const T* x, const T* weight, const T* bias, T* normed, float* mean,
                    float* scale, int64_t M, int64_t D, double eps) {
  std::vector<float> factor(D), shift(D, 0.0f);
  for (int64_t d = 0; d < D; ++d) factor[d] = wide(weight[d]);
  if (bias) for (int64_t d = 0; d < D; ++d) shift[d] = wide(bias[d]);
  const float *__restrict f = factor.data(), *__restrict b = shift.data();
#pragma omp parallel for schedule(static)
  for (int64_t m = 0; m < M; ++m) {
    const T* row = x + m * D;
    T* __restrict y = normed + m * D;
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += wide(row[d]);
    const float center = sum / D;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; ++d) {
      const float away = wide(row[d]) - center;
      squares += away * away;
    }
    const float s = 1.0f / std::sqrt(squares / D + float(eps));
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) narrow((wide(row[d]) - center) * s * f[d] + b[d], y + d);
    mean[m] = center;
    scale[m] = s;
  }
}
// Each thread sums the gradients of weight and bias over its own rows.
template <typename T>
static void backward(const T* dnormed, const T* x, const float* mean, const float* scale,
                     const T* weight, T* dx, T* dweight, T* dbias, int64_t M, int64_t D) {
  const int num_threads = omp_get_max_threads();
  std::vector<float> factor(D), sums(2 * num_threads * D, 0.0f);
  for (int64_t d = 0; d < D; ++d) factor[d] = wide(weight[d]);
#pragma omp parallel num_threads(num_threads)
  {
    const float* __restrict f = factor.data();
    float* __restrict dw = sums.data() + 2 * omp_get_thread_num() * D;
    float* __restrict db = dw + D;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; ++m) {
      const T *dn = dnormed + m * D, *row = x + m * D;
      T* __restrict out = dx + m * D;
      const float center = mean[m], s = scale[m];
      float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (int64_t d = 0; d < D; ++d) {
        const float gradient = wide(dn[d]), unit = (wide(row[d]) - center) * s;
        dw[d] += gradient * unit;
        db[d] += gradient;
        sum += gradient * f[d];
        dot += gradient * f[d] * unit;
      }
      const float first = sum / D, second = dot / D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d) {
        const float unit = (wide(row[d]) - center) * s;
        narrow((wide(dn[d]) * f[d] - first - unit * second) * s, out + d);
      }
    }
  }
  for (int64_t d = 0; d < D; ++d) {
    float dw = 0, db = 0;
    for (int t = 0; t < num_threads; ++t) {
      dw += sums[2 * t * D + d];
      db += sums[(2 * t + 1) * D + d];
    }
    narrow(dw, dweight + d);
    if (dbias) narrow(db, dbias + d);
  }
}
#define DEFINE(NAME, T)                                                                          \
  extern "C" void forward_##NAME(const T* x, const T* w, const T* b, T* y, float* mean, float* s, \
                                 int64_t M, int64_t D, double eps) {                             \
    forward<T>(x, w, b, y, mean, s, M, D, eps);                                                  \
  }                                                                                              \
  extern "C" void backward_##NAME(const T* dn, const T* x, const float* mean, const float* s,    \
                                  const T* w, T* dx, T* dw, T* db, int64_t M, int64_t D,         \
                                  double) {                                                      \
    backward<T>(dn, x, mean, s, w, dx, dw, db, M, D);                                            \
  }
DEFINE(float32, float)
DEFINE(bfloat16, uint16_t)
""",
)


@torch.library.custom_op("plait::layer_norm", mutates_args=())
def _layer_norm(
    x_MD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, and each row's mean and scale."""
    if _kernel.takes(x_MD):
        read = [None if t is None else t.contiguous() for t in (x_MD, weight_D, bias_D)]
        made = (x_MD.new_empty(x_MD.shape), *_statistics(x_MD))
        sizes, dtype = x_MD.shape, x_MD.dtype
        if _kernel.run("forward", (*read, *made), sizes, dtype=dtype, number=eps):
            return made
    return _normed(x_MD, weight_D, bias_D, eps)


def _statistics(x_MD: Tensor) -> tuple[Tensor, Tensor]:
    mean_M, scale_M = (wide(x_MD.new_empty(x_MD.shape[0])) for _ in range(2))
    return mean_M, scale_M


@_layer_norm.register_fake
def _(
    x_MD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x_MD.new_empty(x_MD.shape), *_statistics(x_MD)


@torch.library.custom_op("plait::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dnormed_MD: Tensor, x_MD: Tensor, mean_M: Tensor, scale_M: Tensor, weight_D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias."""
    if _kernel.takes(x_MD):
        read = (dnormed_MD.contiguous(), x_MD.contiguous(), mean_M, scale_M, weight_D.contiguous())
        made = tuple(t.new_empty(t.shape) for t in (x_MD, weight_D, weight_D))
        if _kernel.run("backward", (*read, *made), x_MD.shape, dtype=x_MD.dtype):
            return made
    return _gradients(dnormed_MD, x_MD, mean_M, scale_M, weight_D)


@_layer_norm_backward.register_fake
def _(
    dnormed_MD: Tensor, x_MD: Tensor, mean_M: Tensor, scale_M: Tensor, weight_D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x_MD.new_empty(x_MD.shape),
        weight_D.new_empty(weight_D.shape),
        weight_D.new_empty(weight_D.shape),
    )


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_MD, weight_D, bias_D, _ = inputs
    _, mean_M, scale_M = output
    ctx.has_bias = bias_D is not None
    ctx.save_for_backward(x_MD, mean_M, scale_M, weight_D)
    ctx.mark_non_differentiable(mean_M, scale_M)
    ctx.set_materialize_grads(False)


def _backward(ctx, dnormed_MD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dnormed_MD is None:  # nothing was made of the norm
        return (None,) * 4
    dx, dweight, dbias = torch.ops.plait.layer_norm_backward(dnormed_MD, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None, None


_layer_norm.register_autograd(_backward, setup_context=_save)
