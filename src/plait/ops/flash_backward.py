"""Gradients of PyTorch's causal flash attention on CPUs with units for bfloat16, from its results.

PyTorch's own kernel multiplies block by block without those units. Here each block is a product of
oneDNN, in tiles where there are any (AMX), with scores, probabilities and sums in float32: two to
three times as fast, and gradients of keys and values with half of the error. Level O1 takes it in
place of PyTorch's (`compiler/attention_backward.py`); eager and O0 keep PyTorch's bits.
"""

# Shapes: B batch, T tokens, N query heads, K key-value heads (N = K * G), H head size.

from functools import cache

import torch
from torch import Tensor

from plait.ops.fused_kernel import CppKernel
from plait.ops.numerics import bfloat16_pays

_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def serves(q_BNTH: Tensor, k_BKTH: Tensor) -> bool:
    """Whether the kernel is for these operands, fake or real: causal, as many keys as queries."""
    return (
        q_BNTH.device.type == "cpu"
        and q_BNTH.dtype == torch.bfloat16
        and q_BNTH.shape[2] == k_BKTH.shape[2]
        and q_BNTH.shape[3] % 2 == 0
        and bfloat16_pays("cpu")
    )


@torch.library.custom_op("plait::flash_backward", mutates_args=())
def flash_backward(
    dout_BNTH: Tensor,
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    out_BNTH: Tensor,
    logsumexp_BNT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, laid out as (B, T, heads, H), as PyTorch's are.

    out, logsumexp: of `scaled_dot_product_attention`, causal, with that scale.
    """
    dq, dk, dv = gradients = _new(q_BNTH, k_BKTH)
    read = [x if x.stride(3) == 1 else x.contiguous() for x in (dout_BNTH, q_BNTH, k_BKTH, v_BKTH)]
    read += [out_BNTH if out_BNTH.stride(3) == 1 else out_BNTH.contiguous(), logsumexp_BNT]
    (batch, num_heads, num_tokens, size), num_kv_heads = q_BNTH.shape, k_BKTH.shape[1]
    sizes = [batch, num_heads, num_kv_heads, num_tokens, size]
    sizes += [stride for x in read for stride in x.stride()[:3]]
    tensors = (*read, dq, dk, dv)
    if (
        serves(q_BNTH, k_BKTH)
        and _multiplies()
        and _kernel.run("gradients", tensors, sizes, dtype=torch.bfloat16, number=scale)
    ):
        return gradients
    return _flash_backward(
        dout_BNTH, q_BNTH, k_BKTH, v_BKTH, out_BNTH, logsumexp_BNT, 0.0, True, scale=scale
    )


@flash_backward.register_fake
def _(
    dout_BNTH: Tensor,
    q_BNTH: Tensor,
    k_BKTH: Tensor,
    v_BKTH: Tensor,
    out_BNTH: Tensor,
    logsumexp_BNT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new(q_BNTH, k_BKTH)


def _new(q_BNTH: Tensor, k_BKTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq_BTNH = q_BNTH.new_empty(q_BNTH.transpose(1, 2).shape)
    shape = k_BKTH.transpose(1, 2).shape
    dk_BTKH, dv_BTKH = k_BKTH.new_empty(shape), k_BKTH.new_empty(shape)
    return dq_BTNH.transpose(1, 2), dk_BTKH.transpose(1, 2), dv_BTKH.transpose(1, 2)


@cache
def _multiplies() -> bool:
    """Whether oneDNN has its products of blocks here: asked once, by one of them."""
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    pairs, product = x.view(4, 8, 2).transpose(0, 1).contiguous(), torch.zeros(4, 4)
    is_loaded = _kernel.run("probe", (x, pairs, product), (), dtype=torch.bfloat16)
    return is_loaded and torch.allclose(product, x.float() @ x.float().T, atol=1e-4)


_kernel = CppKernel(
    flash_backward,
    r"""
#include <algorithm>
namespace c10 {
struct BFloat16;
}
namespace at::native::cpublas {  // of ATen/native/CPUBlas.h
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C,
            const c10::BFloat16* A, const c10::BFloat16* B, float* C, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas
typedef uint16_t bf16;
// Keys go down and queries along a block. Of a second operand, two numbers of neighbouring lines
// lie beside each other in one word, as the units take them.
static const int64_t BLOCK = 128;

static void multiply(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t ld_a,
                     const uint32_t* b, int64_t ld_b, float* c, int64_t ld_c, bool adds) {
  at::native::cpublas::brgemm(M, N, K, ld_a, ld_b, ld_c, adds,
                              reinterpret_cast<const c10::BFloat16*>(a),
                              reinterpret_cast<const c10::BFloat16*>(b), c, true);
}
static inline uint32_t rounded(float x) {
  bf16 y;
  narrow(x, &y);
  return y;
}
// Lines as columns, in pairs along H: (H / 2, BLOCK) words.
static void as_columns(const bf16* x, int64_t stride, int64_t lines, int64_t H, uint32_t* out) {
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t h = 0; h < H; h += 2)
      out[h / 2 * BLOCK + i] = uint32_t(x[i * stride + h]) | uint32_t(x[i * stride + h + 1]) << 16;
}
// Lines in pairs, an odd last one with zeros: (lines / 2, H) words.
static void in_pairs(const bf16* x, int64_t stride, int64_t lines, int64_t H, uint32_t* out) {
  for (int64_t i = 0; i < lines; i += 2) {
    const bf16 *low = x + i * stride, *high = low + (i + 1 < lines ? stride : 0);
    const uint32_t mask = i + 1 < lines ? 0xffff0000u : 0;
#pragma omp simd
    for (int64_t h = 0; h < H; ++h)
      out[i / 2 * H + h] = uint32_t(low[h]) | (uint32_t(high[h]) << 16 & mask);
  }
}
// Of scores and the gradients of probabilities: probabilities and the gradients of scores.
template <bool IS_DIAGONAL>
static void through_softmax(const float* scores, const float* dp, const float* lse,
                            const float* delta, float scale, int64_t num_keys, int64_t num_queries,
                            bf16* p, bf16* ds, uint32_t* ds_pairs) {
  for (int64_t n = 0; n < num_keys; n += 2) {
    const int64_t next = n + 1 < num_keys ? BLOCK : 0;
    const float *s0 = scores + n * BLOCK, *s1 = s0 + next, *d0 = dp + n * BLOCK, *d1 = d0 + next;
    bf16 *__restrict p0 = p + n * BLOCK, *__restrict ds0 = ds + n * BLOCK;
    uint32_t* __restrict both = ds_pairs + n / 2 * BLOCK;
    const float is_there = next ? 1.0f : 0.0f;
#pragma omp simd
    for (int64_t m = 0; m < num_queries; ++m) {
      const float x0 = s0[m] * scale - lse[m], x1 = s1[m] * scale - lse[m];
      float y0 = x0 < -69.0f ? 0.0f : exponential(x0);
      float y1 = x1 < -69.0f ? 0.0f : exponential(x1) * is_there;
      if (IS_DIAGONAL) {
        y0 = n > m ? 0.0f : y0;
        y1 = n + 1 > m ? 0.0f : y1;
      }
      const uint32_t g0 = rounded(y0 * (d0[m] - delta[m]) * scale);
      const uint32_t g1 = rounded(y1 * (d1[m] - delta[m]) * scale);
      p0[m] = bf16(rounded(y0));
      p0[m + BLOCK] = bf16(rounded(y1));
      ds0[m] = bf16(g0);
      ds0[m + BLOCK] = bf16(g1);
      both[m] = g0 | g1 << 16;
    }
  }
}
struct Lines {  // one head of a tensor
  const bf16* data;
  int64_t stride;
  const bf16* at(int64_t t) const { return data + t * stride; }
};
// What one thread holds of the keys and values of a head, and of one block.
struct Head {
  const int64_t T, H, ld_T;
  std::vector<bf16> keys, values, keys_as_columns, p, ds;
  std::vector<uint32_t> q_columns, dout_columns, q_pairs, dout_pairs, ds_pairs;
  std::vector<float> scores, dp, dq, dk, dv, lse, delta;
  Head(int64_t T, int64_t H)
      : T(T), H(H), ld_T(T + T % 2), keys(T * H), values(T * H), keys_as_columns(H * ld_T),
        p((BLOCK + 1) * BLOCK), ds((BLOCK + 1) * BLOCK), q_columns(H / 2 * BLOCK),
        dout_columns(H / 2 * BLOCK), q_pairs(BLOCK / 2 * H), dout_pairs(BLOCK / 2 * H),
        ds_pairs(BLOCK / 2 * BLOCK), scores(BLOCK * BLOCK), dp(BLOCK * BLOCK), dq(H * BLOCK),
        dk(T * H), dv(T * H), lse(BLOCK), delta(BLOCK) {}

  void begin(Lines k, Lines v) {
    for (int64_t t = 0; t < T; ++t) {
      std::memcpy(&keys[t * H], k.at(t), 2 * H);
      std::memcpy(&values[t * H], v.at(t), 2 * H);
      for (int64_t h = 0; h < H; ++h) keys_as_columns[h * ld_T + t] = k.at(t)[h];
    }
    std::fill(dk.begin(), dk.end(), 0.0f);
    std::fill(dv.begin(), dv.end(), 0.0f);
  }
  void take_queries(Lines q, Lines dout, Lines out, int64_t i, int64_t M) {
    as_columns(q.at(i), q.stride, M, H, q_columns.data());
    as_columns(dout.at(i), dout.stride, M, H, dout_columns.data());
    in_pairs(q.at(i), q.stride, M, H, q_pairs.data());
    in_pairs(dout.at(i), dout.stride, M, H, dout_pairs.data());
    for (int64_t m = 0; m < M; ++m) {
      const bf16 *d = dout.at(i + m), *o = out.at(i + m);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t h = 0; h < H; ++h) sum += wide(d[h]) * wide(o[h]);
      delta[m] = sum;
    }
  }
  void block(int64_t i, int64_t M, int64_t j, float scale) {
    const int64_t L = std::min(BLOCK, T - j), even_L = L + L % 2, even_M = M + M % 2;
    multiply(L, M, H, &keys[j * H], H, q_columns.data(), BLOCK, scores.data(), BLOCK, false);
    multiply(L, M, H, &values[j * H], H, dout_columns.data(), BLOCK, dp.data(), BLOCK, false);
    if (even_M > M)  // a last query of zeros
      for (int64_t l = 0; l < L; ++l) p[l * BLOCK + M] = ds[l * BLOCK + M] = 0;
    (j == i ? through_softmax<true> : through_softmax<false>)(
        scores.data(), dp.data(), lse.data(), delta.data(), scale, L, M, p.data(), ds.data(),
        ds_pairs.data());
    multiply(L, H, even_M, p.data(), BLOCK, dout_pairs.data(), H, &dv[j * H], H, true);
    multiply(L, H, even_M, ds.data(), BLOCK, q_pairs.data(), H, &dk[j * H], H, true);
    multiply(H, M, even_L, &keys_as_columns[j], ld_T, ds_pairs.data(), BLOCK, dq.data(), BLOCK,
             j > 0);
  }
};
extern "C" void gradients_bfloat16(
    const bf16* dout, const bf16* q, const bf16* k, const bf16* v, const bf16* out,
    const float* lse, bf16* dq, bf16* dk, bf16* dv, int64_t B, int64_t N, int64_t K, int64_t T,
    int64_t H, int64_t dout_b, int64_t dout_n, int64_t dout_t, int64_t q_b, int64_t q_n,
    int64_t q_t, int64_t k_b, int64_t k_n, int64_t k_t, int64_t v_b, int64_t v_n, int64_t v_t,
    int64_t out_b, int64_t out_n, int64_t out_t, int64_t lse_b, int64_t lse_n, int64_t lse_t,
    double scale) {
#pragma omp parallel
  {
    Head x(T, H);
#pragma omp for schedule(dynamic)
    for (int64_t each = 0; each < B * K; ++each) {
      const int64_t b = each / K, head = each % K, first = head * (N / K), last = first + N / K;
      x.begin({k + b * k_b + head * k_n, k_t}, {v + b * v_b + head * v_n, v_t});
      for (int64_t n = first; n < last; ++n)
        for (int64_t i = 0; i < T; i += BLOCK) {
          const int64_t M = std::min(BLOCK, T - i);
          x.take_queries({q + b * q_b + n * q_n, q_t}, {dout + b * dout_b + n * dout_n, dout_t},
                         {out + b * out_b + n * out_n, out_t}, i, M);
          for (int64_t m = 0; m < M; ++m) x.lse[m] = lse[b * lse_b + n * lse_n + (i + m) * lse_t];
          for (int64_t j = 0; j <= i; j += BLOCK) x.block(i, M, j, scale);
          for (int64_t m = 0; m < M; ++m)
            for (int64_t h = 0; h < H; ++h)
              narrow(x.dq[h * BLOCK + m], dq + ((b * T + i + m) * N + n) * H + h);
        }
      for (int64_t t = 0; t < T; ++t)
        for (int64_t h = 0; h < H; ++h) {
          narrow(x.dk[t * H + h], dk + ((b * T + t) * K + head) * H + h);
          narrow(x.dv[t * H + h], dv + ((b * T + t) * K + head) * H + h);
        }
    }
    at::native::cpublas::brgemm_release(true);
  }
}
extern "C" void probe_bfloat16(const bf16* x, const uint32_t* pairs, float* product, double) {
  try {
    multiply(4, 4, 16, x, 16, pairs, 4, product, 4, false);
    at::native::cpublas::brgemm_release(true);
  } catch (...) {  // it says so where it has none; the product stays zero
  }
}
""",
)
