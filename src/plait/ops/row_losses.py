"""Cross-entropies of rows of logits and their gradients, which are written over the logits."""

# Shapes: M rows (tokens), V vocabulary, b rows of one block.

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from plait.errors import ModelError
from plait.ops.fused_kernel import CppKernel, triton_kernels

_BLOCK_ELEMENTS = 2**20
"""Logits whose softmax is taken at a time: 4 MiB in float32, so that they stay in cache."""
_SMALLEST_COMPILED = 2**20
"""Logits from which a kernel of our own is worth a second or two, once, to compile and load it."""
_SMALLEST_SHARE = 1e-30
"""A smaller probability has no gradient: times the weight of its token, or squared, it would leave
the range of normal numbers, and products of such operands take many a CPU ten times as long."""


def losses_to_gradients(
    logits_MV: Tensor,
    targets_M: Tensor,
    with_gradients: bool,
    soft_cap: float,
    *,
    is_strict: bool = False,
) -> Tensor:
    """Return each row's loss; with gradients, overwrite the logits by theirs.

    is_strict: by PyTorch's operators, of which it is known that rows do not depend on each other.
    Raises ModelError for a target that is no column; on a GPU that is found later, by the device.
    """
    if logits_MV.is_cuda and (kernels := triton_kernels()):
        return kernels.losses_to_gradients(logits_MV, targets_M, with_gradients, soft_cap)
    losses_M = torch.empty(logits_MV.shape[0], dtype=torch.float32, device=logits_MV.device)
    is_fake, num_classes = isinstance(logits_MV, FakeTensor), logits_MV.shape[1]
    if not is_fake and not logits_MV.is_cuda and (largest := int(targets_M.max())) >= num_classes:
        raise ModelError(f"target {largest} is none of {num_classes} classes, 0 and up.")
    if not is_strict and logits_MV.numel() >= _SMALLEST_COMPILED and _kernel.serves(logits_MV):
        if is_fake:  # nothing else would be allocated
            return losses_M
        tensors = (logits_MV, targets_M.contiguous(), losses_M)
        sizes = (*logits_MV.shape, int(with_gradients))
        if _kernel.run("losses", tensors, sizes, dtype=logits_MV.dtype, number=soft_cap):
            return losses_M
    num_rows = max(1, _BLOCK_ELEMENTS // num_classes)
    for start in range(0, logits_MV.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        losses_M[rows] = _of_block(logits_MV[rows], targets_M[rows], with_gradients, soft_cap)
    return losses_M


def _of_block(
    logits_bV: Tensor, targets_b: Tensor, with_gradients: bool, soft_cap: float
) -> Tensor:
    """The same by PyTorch's operators, with a few float32 blocks beside."""
    is_counted_b, index_b1 = targets_b >= 0, targets_b.clamp(min=0)[:, None]
    x_bV = logits_bV.float()
    if soft_cap:
        x_bV = torch.tanh_(x_bV / soft_cap).mul_(soft_cap)
    p_bV = torch.softmax(x_bV, dim=-1)
    logp_b1 = p_bV.gather(1, index_b1).log()
    # A probability below float32's range asks for the slower formula. (On a GPU always: looking
    # would make the host wait for the device.)
    if p_bV.is_cuda or logp_b1.isinf().any():
        slower_b1 = torch.log_softmax(x_bV, dim=-1).gather(1, index_b1)
        logp_b1 = torch.where(logp_b1.isinf(), slower_b1, logp_b1)
    if with_gradients:
        if not p_bV.is_cuda:
            torch.threshold_(p_bV, _SMALLEST_SHARE, 0.0)
        p_bV.scatter_add_(1, index_b1, p_bV.new_full((), -1.0).expand(index_b1.shape))
        if soft_cap:  # the derivative of the tanh
            p_bV.mul_(1 - (x_bV / soft_cap).square_())
        logits_bV.copy_(p_bV.mul_(is_counted_b[:, None]))
    return torch.where(is_counted_b, -logp_b1[:, 0], 0.0)


_kernel = CppKernel(
    losses_to_gradients,
    r"""
#include <cmath>
// A share below _SMALLEST_SHARE is none.
static inline float share_of(float x) { return x < -69.0f ? 0.0f : exponential(x); }
template <bool HAS_CAP>
static inline float capped(float x, float cap) {  // cap tanh(x / cap)
  return HAS_CAP ? cap * (1.0f - 2.0f / (1.0f + exponential(2.0f * x / cap))) : x;
}
// A row is in the cache when it is read again, and so are its exponentials.
template <bool HAS_CAP, typename T>
static void losses(T* logits, const int64_t* targets, float* result, int64_t M, int64_t V,
                   int64_t with_gradients, float cap) {
#pragma omp parallel
  {
    std::vector<float> kept(V);
    float* __restrict share = kept.data();
#pragma omp for schedule(static)
    for (int64_t m = 0; m < M; ++m) {
      T* __restrict row = logits + m * V;
      const bool is_counted = targets[m] >= 0;
      const int64_t target = is_counted ? targets[m] : 0;
      const float chosen = capped<HAS_CAP>(wide(row[target]), cap);
      float largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
      for (int64_t v = 0; v < V; ++v) largest = wide(row[v]) > largest ? wide(row[v]) : largest;
      largest = capped<HAS_CAP>(largest, cap);
#pragma omp simd reduction(+ : total)
      for (int64_t v = 0; v < V; ++v) {
        share[v] = share_of(capped<HAS_CAP>(wide(row[v]), cap) - largest);
        total += share[v];
      }
      result[m] = is_counted ? largest + std::log(total) - chosen : 0.0f;
      if (!with_gradients) continue;
      const float scale = is_counted ? 1.0f / total : 0.0f;
      share[target] -= total;  // the derivative is the probability, less one at the target
#pragma omp simd
      for (int64_t v = 0; v < V; ++v) {
        const float x = HAS_CAP ? capped<HAS_CAP>(wide(row[v]), cap) / cap : 0.0f;
        narrow(share[v] * scale * (1.0f - x * x), row + v);
      }
    }
  }
}
#define DEFINE(NAME, T)                                                                        \
  extern "C" void NAME(T* x, const int64_t* t, float* y, int64_t M, int64_t V, int64_t g,      \
                       double cap) {                                                           \
    cap ? losses<true, T>(x, t, y, M, V, g, cap) : losses<false, T>(x, t, y, M, V, g, 1.0f);   \
  }
DEFINE(losses_float32, float)
DEFINE(losses_bfloat16, uint16_t)
""",
)
