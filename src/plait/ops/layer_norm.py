"""Layer norm [Ba et al. 2016, arXiv:1607.06450, eq. 3].

PyTorch's kernels but for bfloat16 on a CPU: there PyTorch keeps statistics in bfloat16 and takes a
second pass over the rows for the gradients of weight and bias. Ours are float32, and forward and
backward one pass each; the result is rounded once, at the end.
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
    if bias_D is not None:
        normed = normed + wide(bias_D)
    return normed.to(x_MD.dtype), mean_M, scale_M


def _gradients(
    dnormed_MD: Tensor, x_MD: Tensor, mean_M: Tensor, scale_M: Tensor, weight_D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dnormed, unit = wide(dnormed_MD), (wide(x_MD) - mean_M[:, None]) * scale_M[:, None]
    dunit = dnormed * wide(weight_D)
    along_M1 = (dunit * unit).mean(-1, keepdim=True)
    dx_MD = (dunit - dunit.mean(-1, keepdim=True) - unit * along_M1) * scale_M[:, None]
    dweight_D, dbias_D = (dnormed * unit).sum(0), dnormed.sum(0)
    return dx_MD.to(x_MD.dtype), dweight_D.to(weight_D.dtype), dbias_D.to(weight_D.dtype)


_kernel = CppKernel(
    layer_norm,
    r"""
extern "C" void normed_bfloat16(const uint16_t* x, const uint16_t* weight, const uint16_t* bias,
                                uint16_t* normed, float* means, float* scales, int64_t M,
                                int64_t D, double eps) {
  std::vector<float> factor(D), shift(D, 0.0f);
  for (int64_t d = 0; d < D; ++d) factor[d] = wide(weight[d]);
  if (bias) for (int64_t d = 0; d < D; ++d) shift[d] = wide(bias[d]);
  const float *f = factor.data(), *b = shift.data();
#pragma omp parallel for schedule(static)
  for (int64_t m = 0; m < M; ++m) {
    const uint16_t* row = x + m * D;
    uint16_t* __restrict to = normed + m * D;
    float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < D; ++d) sum += wide(row[d]);
    const float mean = sum / D;
    // A second pass, over a row that is in the cache: no difference of large numbers.
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < D; ++d) squares += (wide(row[d]) - mean) * (wide(row[d]) - mean);
    const float scale = 1.0f / std::sqrt(squares / D + float(eps));
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) narrow((wide(row[d]) - mean) * scale * f[d] + b[d], to + d);
    means[m] = mean;
    scales[m] = scale;
  }
}
// Each thread sums the gradients of weight and bias over its own rows.
extern "C" void gradients_bfloat16(const uint16_t* dnormed, const uint16_t* x, const float* means,
                                   const float* scales, const uint16_t* weight, uint16_t* dx,
                                   uint16_t* dweight, uint16_t* dbias, int64_t M, int64_t D,
                                   double) {
  const int num_threads = omp_get_max_threads();
  std::vector<float> factor(D), sums(2 * num_threads * D, 0.0f);
  for (int64_t d = 0; d < D; ++d) factor[d] = wide(weight[d]);
#pragma omp parallel num_threads(num_threads)
  {
    const float* __restrict f = factor.data();
    float* __restrict sum = sums.data() + 2 * omp_get_thread_num() * D;
    float* __restrict sum_b = sum + D;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; ++m) {
      const uint16_t *dn = dnormed + m * D, *row = x + m * D;
      uint16_t* __restrict to = dx + m * D;
      const float mean = means[m], scale = scales[m];
      float dot = 0, total = 0;
#pragma omp simd reduction(+ : dot, total)
      for (int64_t d = 0; d < D; ++d) {
        const float dy = wide(dn[d]), product = dy * ((wide(row[d]) - mean) * scale);
        sum[d] += product;
        sum_b[d] += dy;
        dot += product * f[d];
        total += dy * f[d];
      }
      const float along = dot / D * scale, every = total / D;
#pragma omp simd
      for (int64_t d = 0; d < D; ++d)
        narrow((wide(dn[d]) * f[d] - every - (wide(row[d]) - mean) * along) * scale, to + d);
    }
  }
  for (int64_t d = 0; d < D; ++d) {
    float sum = 0, sum_b = 0;
    for (int t = 0; t < num_threads; ++t) {
      sum += sums[2 * t * D + d];
      sum_b += sums[(2 * t + 1) * D + d];
    }
    narrow(sum, dweight + d);
    narrow(sum_b, dbias + d);
  }
}
""",
    dtypes=(torch.bfloat16,),
)


@torch.library.custom_op("plait::layer_norm", mutates_args=())
def _layer_norm(
    x_MD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, and each row's mean and scale."""
    if _kernel.takes(x_MD):
        normed_MD, mean_M, scale_M = _empty(x_MD)
        bias_D = None if bias_D is None else bias_D.contiguous()
        operands = (x_MD.contiguous(), weight_D.contiguous(), bias_D)
        tensors = (*operands, normed_MD, mean_M, scale_M)
        if _kernel.run("normed", tensors, x_MD.shape, dtype=x_MD.dtype, number=eps):
            return normed_MD, mean_M, scale_M
    return _normed(x_MD, weight_D, bias_D, eps)


@_layer_norm.register_fake
def _(
    x_MD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x_MD)


def _empty(x_MD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean_M, scale_M = (wide(x_MD.new_empty(x_MD.shape[0])) for _ in range(2))
    return x_MD.new_empty(x_MD.shape), mean_M, scale_M


@torch.library.custom_op("plait::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    dnormed_MD: Tensor, x_MD: Tensor, mean_M: Tensor, scale_M: Tensor, weight_D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias."""
    if _kernel.takes(x_MD):
        results = _empty_gradients(x_MD, weight_D)
        operands = dnormed_MD.contiguous(), x_MD.contiguous(), mean_M, scale_M
        tensors = (*operands, weight_D.contiguous(), *results)
        if _kernel.run("gradients", tensors, x_MD.shape, dtype=x_MD.dtype):
            return results
    return _gradients(dnormed_MD, x_MD, mean_M, scale_M, weight_D)


@_layer_norm_backward.register_fake
def _(
    dnormed_MD: Tensor, x_MD: Tensor, mean_M: Tensor, scale_M: Tensor, weight_D: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(x_MD, weight_D)


def _empty_gradients(x_MD: Tensor, weight_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dweight_D, dbias_D = (weight_D.new_empty(weight_D.shape) for _ in range(2))
    return x_MD.new_empty(x_MD.shape), dweight_D, dbias_D


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_MD, weight_D, bias_D, _ = inputs
    _, mean_M, scale_M = output
    ctx.has_bias = bias_D is not None
    ctx.save_for_backward(x_MD, mean_M, scale_M, weight_D)
    ctx.mark_non_differentiable(mean_M, scale_M)


def _backward(ctx, dnormed_MD: Tensor, *_: None) -> tuple:
    dx, dweight, dbias = torch.ops.plait.layer_norm_backward(dnormed_MD, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None, None


_layer_norm.register_autograd(_backward, setup_context=_save)
