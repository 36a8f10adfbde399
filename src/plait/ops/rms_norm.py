"""Root mean square norm, with or without a residual that is added before.

Statistics are float32 (float64 for float64) and the result is rounded once, at the end. The sum
with the residual is a result too: the next residual. Forward and backward are one kernel each.
"""

# Shapes: M rows, D width.

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.ops.fused_kernel import CppKernel, FusedKernel, rows_of, triton_kernels
from plait.ops.numerics import check_alike
from plait.ops.work import Work, pointwise_work, wide


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float, offset: float = 0.0) -> Tensor:
    """Scale rows (last dim) to unit root mean square, then by offset + weight.

    [Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4]; Gemma's checkpoints want an offset of 1.
    Raises ModelError where the weight does not fit, or dtypes or devices differ.
    """
    _check(x, weight_D)
    normed_MD, _, _ = torch.ops.plait.rms_norm(rows_of(x), None, weight_D, eps, offset)
    return normed_MD if x.dim() == 2 else normed_MD.view(x.shape)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, *, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the norm of x + residual, and that sum."""
    _check(x, weight_D, residual)
    rows = rows_of(x), rows_of(residual)
    normed, total, _ = torch.ops.plait.rms_norm(*rows, weight_D, eps, offset)
    return (normed, total) if x.dim() == 2 else (normed.view(x.shape), total.view(x.shape))


def reference_rms_norm(
    x: Tensor, weight_D: Tensor, *, eps: float, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor:
    """The formula in the dtype of its operands."""
    total = x if residual is None else x + residual
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return total * scale * (offset + weight_D)


def rms_norm_work(x: Tensor, weight_D: Tensor, residual: Tensor | None = None) -> tuple[Work, Work]:
    """Forward and backward. The backward reads the sum, both gradients and the weight."""
    sums = () if residual is None else (x,)
    forward = pointwise_work(4 + len(sums), x, x, residual, weight_D, x, *sums)
    return forward, pointwise_work(10 + len(sums), x, x, x, *sums, weight_D, x, weight_D)


def _check(x: Tensor, weight_D: Tensor, residual: Tensor | None = None) -> None:
    check_alike("rms_norm", *(t for t in (x, weight_D, residual) if t is not None))
    if x.dim() < 1 or weight_D.shape != x.shape[-1:]:
        raise ModelError(
            f"rms_norm of {tuple(x.shape)} needs a weight of its last dim alone, "
            f"got {tuple(weight_D.shape)}."
        )
    if residual is not None and residual.shape != x.shape:
        raise ModelError(
            f"rms_norm needs a residual of the shape of x, {tuple(x.shape)}, "
            f"got {tuple(residual.shape)}."
        )


def _normed(x_MD: Tensor, weight_D: Tensor, *, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    x = wide(x_MD)
    scale_M = torch.rsqrt(x.square().mean(-1) + eps)
    normed = x * scale_M[:, None] * (offset + wide(weight_D))
    return normed.to(x_MD.dtype), scale_M


def _added(
    x_MD: Tensor, residual_MD: Tensor, weight_D: Tensor, *, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    total_MD = x_MD + residual_MD
    normed_MD, scale_M = _normed(total_MD, weight_D, eps=eps, offset=offset)
    return normed_MD, scale_M, total_MD


def _gradients(
    dnormed_MD: Tensor,
    dsum_MD: Tensor | None,
    total_MD: Tensor,
    scale_M: Tensor,
    weight_D: Tensor,
    offset: float,
) -> tuple[Tensor, Tensor]:
    dnormed, unit = wide(dnormed_MD), wide(total_MD) * scale_M[:, None]
    dunit = dnormed * (offset + wide(weight_D))
    mean_M1 = (dunit * unit).mean(-1, keepdim=True)
    dtotal_MD = (dunit - unit * mean_M1) * scale_M[:, None]
    if dsum_MD is not None:
        dtotal_MD = dtotal_MD + wide(dsum_MD)
    dweight_D = (dnormed * unit).sum(0)
    return dtotal_MD.to(total_MD.dtype), dweight_D.to(weight_D.dtype)


_normed_kernel = FusedKernel(_normed)
_added_kernel = FusedKernel(_added)
# Inductor sums the gradient of the weight column by column, in a second pass over memory.
_gradients_kernel = CppKernel(
    _gradients,
    r"""
// One pass over the rows. Each thread sums the gradient of the weight over its own rows.
template <typename T>
static void gradients(const T* dnormed, const T* dsum, const T* total, const float* scale,
                      const T* weight, T* dtotal, T* dweight, int64_t M, int64_t D, float offset) {
  const int num_threads = omp_get_max_threads();
  std::vector<float> factor(D), sums(num_threads * D, 0.0f);
  for (int64_t d = 0; d < D; ++d) factor[d] = offset + wide(weight[d]);
#pragma omp parallel num_threads(num_threads)
  {
    const float* __restrict f = factor.data();
    float* __restrict sum = sums.data() + omp_get_thread_num() * D;
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; ++m) {
      const T *dn = dnormed + m * D, *x = total + m * D;
      T* __restrict dx = dtotal + m * D;
      const float s = scale[m];
      float dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < D; ++d) {
        const float product = wide(dn[d]) * wide(x[d]) * s;
        sum[d] += product;
        dot += product * f[d];
      }
      const float mean = dot / D * s;
      if (dsum) {
        const T* ds = dsum + m * D;
#pragma omp simd
        for (int64_t d = 0; d < D; ++d)
          narrow((wide(dn[d]) * f[d] - wide(x[d]) * mean) * s + wide(ds[d]), dx + d);
      } else {
#pragma omp simd
        for (int64_t d = 0; d < D; ++d)
          narrow((wide(dn[d]) * f[d] - wide(x[d]) * mean) * s, dx + d);
      }
    }
  }
  for (int64_t d = 0; d < D; ++d) {
    float sum = 0;
    for (int t = 0; t < num_threads; ++t) sum += sums[t * D + d];
    narrow(sum, dweight + d);
  }
}
#define DEFINE(NAME, T)                                                                       \
  extern "C" void NAME(const T* dn, const T* ds, const T* x, const float* s, const T* w, T* dx, \
                       T* dw, int64_t M, int64_t D, double offset) {                          \
    gradients<T>(dn, ds, x, s, w, dx, dw, M, D, offset);                                      \
  }
DEFINE(gradients_float32, float)
DEFINE(gradients_bfloat16, uint16_t)
""",
)


@torch.library.custom_op("plait::rms_norm", mutates_args=())
def _rms_norm(
    x_MD: Tensor, residual_MD: Tensor | None, weight_D: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the sum (nothing without a residual) and each row's scale."""
    if residual_MD is None:
        normed_MD, scale_M = _normed_kernel(x_MD, weight_D, eps=eps, offset=offset)
        return normed_MD, x_MD.new_empty(0), scale_M
    normed_MD, scale_M, total_MD = _added_kernel(
        x_MD, residual_MD, weight_D, eps=eps, offset=offset
    )
    return normed_MD, total_MD, scale_M


@_rms_norm.register_fake
def _(
    x_MD: Tensor, residual_MD: Tensor | None, weight_D: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    scale_M = wide(x_MD.new_empty(x_MD.shape[0]))
    total_MD = x_MD.new_empty(0 if residual_MD is None else x_MD.shape)
    return x_MD.new_empty(x_MD.shape), total_MD, scale_M


@torch.library.custom_op("plait::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dnormed_MD: Tensor,
    dsum_MD: Tensor | None,
    total_MD: Tensor,
    scale_M: Tensor,
    weight_D: Tensor,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Of the sum (or x) and of the weight. dsum: the sum's gradient from its other users."""
    if total_MD.is_cuda and (kernels := triton_kernels()) and kernels.takes_norm(total_MD):
        read = [None if t is None else t.contiguous() for t in (dnormed_MD, dsum_MD, total_MD)]
        return kernels.norm_gradients(
            *read,
            scale_M,
            weight_D.contiguous(),
            offset,
            # Four programs for each multiprocessor keep it busy; each sums its own rows.
            num_programs=4 * torch.cuda.get_device_properties().multi_processor_count,
        )
    if _gradients_kernel.takes(total_MD):
        dtotal_MD, dweight_D = (t.new_empty(t.shape) for t in (total_MD, weight_D))
        read = [None if t is None else t.contiguous() for t in (dnormed_MD, dsum_MD, total_MD)]
        tensors = (*read, scale_M, weight_D.contiguous(), dtotal_MD, dweight_D)
        sizes, dtype = total_MD.shape, total_MD.dtype
        if _gradients_kernel.run("gradients", tensors, sizes, dtype=dtype, number=offset):
            return dtotal_MD, dweight_D
    return _gradients(dnormed_MD, dsum_MD, total_MD, scale_M, weight_D, offset)


@_rms_norm_backward.register_fake
def _(
    dnormed_MD: Tensor,
    dsum_MD: Tensor | None,
    total_MD: Tensor,
    scale_M: Tensor,
    weight_D: Tensor,
    offset: float,
) -> tuple[Tensor, Tensor]:
    return total_MD.new_empty(total_MD.shape), weight_D.new_empty(weight_D.shape)


def _save(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_MD, residual_MD, weight_D, _, ctx.offset = inputs
    _, total_MD, scale_M = output
    ctx.has_residual = residual_MD is not None
    ctx.save_for_backward(total_MD if ctx.has_residual else x_MD, scale_M, weight_D)
    ctx.mark_non_differentiable(scale_M)
    ctx.set_materialize_grads(False)  # a sum that nobody else uses has no zeros to be read


def _backward(ctx, dnormed_MD: Tensor | None, dsum_MD: Tensor | None, _: None) -> tuple:
    if dnormed_MD is None:  # the sum alone was used
        return dsum_MD, dsum_MD, None, None, None
    dx, dweight = torch.ops.plait.rms_norm_backward(
        dnormed_MD, dsum_MD if ctx.has_residual else None, *ctx.saved_tensors, ctx.offset
    )
    return dx, dx if ctx.has_residual else None, dweight, None, None


_rms_norm.register_autograd(_backward, setup_context=_save)
