"""Gradients of PyTorch's causal flash attention on CPUs with wide vectors, from its results.

Each block is a product of oneDNN, in bfloat16 by the units for it (tiles, where there are AMX's),
which PyTorch's own kernel does without. Scores, probabilities and sums are float32: in bfloat16 two
to three times as fast, with half of the error in gradients of keys and values, in float32 a tenth
to a third faster. Level O1 takes it in place of PyTorch's (`compiler/attention_backward.py`); eager
and O0 keep PyTorch's bits.
"""

# Shapes: B batch, T tokens, N query heads, K key-value heads (N = K * G), H head size.

from functools import cache

import torch
from torch import Tensor

from plait.ops.fused_kernel import CppKernel
from plait.ops.numerics import bfloat16_pays

_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_SMALLEST_COMPILED = 2**20
"""Scores from which a kernel of our own is worth three seconds, once, to compile and load it."""


def serves(q_BNTH: Tensor, k_BKTH: Tensor) -> bool:
    """Whether the kernel is for these operands, fake or real: causal, as many keys as queries."""
    pays = {torch.bfloat16: bfloat16_pays("cpu"), torch.float32: torch.cpu._is_avx512_supported()}
    return (
        q_BNTH.device.type == "cpu"
        and pays.get(q_BNTH.dtype, False)
        and q_BNTH.shape[2] == k_BKTH.shape[2]
        and q_BNTH.shape[3] % 2 == 0
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
    given = (dout_BNTH, q_BNTH, k_BKTH, v_BKTH, out_BNTH)
    (batch, num_heads, num_tokens, size), num_kv_heads = q_BNTH.shape, k_BKTH.shape[1]
    is_large = batch * num_heads * num_tokens**2 >= _SMALLEST_COMPILED
    if not (is_large and serves(q_BNTH, k_BKTH) and _multiplies(q_BNTH.dtype)):
        return _flash_backward(*given, logsumexp_BNT, 0.0, True, scale=scale)
    read = [*(x if x.stride(3) == 1 else x.contiguous() for x in given), logsumexp_BNT]
    sizes = [batch, num_heads, num_kv_heads, num_tokens, size]
    sizes += [stride for x in read for stride in x.stride()[:3]]
    gradients = _new(q_BNTH, k_BKTH)
    _kernel.run("gradients", (*read, *gradients), sizes, dtype=q_BNTH.dtype, number=scale)
    return gradients


@flash_backward.register_fake
def _(
    dout_BNTH: Tensor, q_BNTH: Tensor, k_BKTH: Tensor, *others: object
) -> tuple[Tensor, Tensor, Tensor]:
    return _new(q_BNTH, k_BKTH)


def _new(q_BNTH: Tensor, k_BKTH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dq_BTNH = q_BNTH.new_empty(q_BNTH.transpose(1, 2).shape)
    shape = k_BKTH.transpose(1, 2).shape
    dk_BTKH, dv_BTKH = k_BKTH.new_empty(shape), k_BKTH.new_empty(shape)
    return dq_BTNH.transpose(1, 2), dk_BTKH.transpose(1, 2), dv_BTKH.transpose(1, 2)


@cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has its products of blocks here: asked once, by one of them."""
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    pair = 4 // x.element_size()
    words, product = x.view(4, 16 // pair, pair).transpose(0, 1).contiguous(), torch.zeros(4, 4)
    is_loaded = _kernel.run("probe", (x, words, product), (), dtype=dtype)
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
void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C,
            const float* A, const float* B, float* C, bool is_vnni);
void brgemm_release(bool is_vnni);
}  // namespace at::native::cpublas
typedef uint16_t bf16;
// Keys go down and queries along a block. Of a second operand in bfloat16, two numbers of
// neighbouring lines lie beside each other in one word, as the units take them; in float32 there
// are no pairs.
static const int64_t BLOCK = 128;
template <typename T> struct Word { typedef uint32_t type; };
template <> struct Word<float> { typedef float type; };

static void multiply(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t ld_a,
                     const uint32_t* b, int64_t ld_b, float* c, int64_t ld_c, bool adds) {
  at::native::cpublas::brgemm(M, N, K, ld_a, ld_b, ld_c, adds,
                              reinterpret_cast<const c10::BFloat16*>(a),
                              reinterpret_cast<const c10::BFloat16*>(b), c, true);
}
static void multiply(int64_t M, int64_t N, int64_t K, const float* a, int64_t ld_a, const float* b,
                     int64_t ld_b, float* c, int64_t ld_c, bool adds) {
  at::native::cpublas::brgemm(M, N, K, ld_a, ld_b, ld_c, adds, a, b, c, false);
}
static inline uint32_t paired(bf16 low, bf16 high) { return uint32_t(low) | uint32_t(high) << 16; }
// Lines as columns, in pairs along H: (H / 2, BLOCK) words.
static void as_columns(const bf16* x, int64_t stride, int64_t lines, int64_t H, uint32_t* out) {
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t h = 0; h < H; h += 2)
      out[h / 2 * BLOCK + i] = paired(x[i * stride + h], x[i * stride + h + 1]);
}
static void as_columns(const float* x, int64_t stride, int64_t lines, int64_t H, float* out) {
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t h = 0; h < H; ++h) out[h * BLOCK + i] = x[i * stride + h];
}
// Lines in pairs, an even number of them, the last perhaps of zeros: (lines / 2, H) words.
static void in_pairs(const bf16* x, int64_t stride, int64_t lines, int64_t H, uint32_t* out) {
  for (int64_t i = 0; i < lines; i += 2) {
    const bf16 *low = x + i * stride, *high = low + (i + 1 < lines ? stride : 0);
    const uint32_t mask = i + 1 < lines ? 0xffffffffu : 0x0000ffffu;
#pragma omp simd
    for (int64_t h = 0; h < H; ++h) out[i / 2 * H + h] = paired(low[h], high[h]) & mask;
  }
}
static void in_pairs(const float* x, int64_t stride, int64_t lines, int64_t H, float* out) {
  for (int64_t i = 0; i < lines; ++i) std::memcpy(out + i * H, x + i * stride, 4 * H);
  if (lines % 2) std::memset(out + lines * H, 0, 4 * H);
}
static inline void put(float low, float high, bf16* lines, uint32_t* words) {
  narrow(low, lines);
  narrow(high, lines + BLOCK);
  *words = paired(*lines, lines[BLOCK]);
}
static inline void put(float low, float high, float* lines, float* words) {
  *lines = *words = low;
  lines[BLOCK] = words[BLOCK] = high;
}
// Of scores and the gradients of probabilities: probabilities and the gradients of scores.
template <bool IS_DIAGONAL, typename T, typename W>
static void through_softmax(const float* scores, const float* dp, const float* lse,
                            const float* delta, float scale, int64_t num_keys, int64_t num_queries,
                            T* p, T* ds, W* ds_words) {
  for (int64_t n = 0; n < num_keys; n += 2) {
    const int64_t next = n + 1 < num_keys ? BLOCK : 0;
    const float *s0 = scores + n * BLOCK, *s1 = s0 + next, *d0 = dp + n * BLOCK, *d1 = d0 + next;
    T *__restrict p0 = p + n * BLOCK, *__restrict ds0 = ds + n * BLOCK;
    W* __restrict words = ds_words + n * BLOCK * sizeof(T) / sizeof(W);
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
      narrow(y0, p0 + m);
      narrow(y1, p0 + m + BLOCK);
      put(y0 * (d0[m] - delta[m]) * scale, y1 * (d1[m] - delta[m]) * scale, ds0 + m, words + m);
    }
  }
}
template <typename T> struct Lines {  // one head of a tensor
  const T* data;
  int64_t stride;
  const T* at(int64_t t) const { return data + t * stride; }
};
// What one thread holds of the keys and values of a head, and of one block.
template <typename T> struct Head {
  typedef typename Word<T>::type W;
  static const int64_t PAIR = sizeof(W) / sizeof(T);
  const int64_t T_, H, ld_T;
  std::vector<T> keys, values, keys_as_columns, p, ds;
  std::vector<W> q_columns, dout_columns, q_pairs, dout_pairs, ds_pairs;
  std::vector<float> scores, dp, dq, dk, dv, lse, delta;
  Head(int64_t tokens, int64_t H)
      : T_(tokens), H(H), ld_T(T_ + T_ % 2), keys(T_ * H), values(T_ * H),
        keys_as_columns(H * ld_T), p((BLOCK + 1) * BLOCK), ds((BLOCK + 1) * BLOCK),
        q_columns(H / PAIR * BLOCK), dout_columns(H / PAIR * BLOCK), q_pairs(BLOCK / PAIR * H),
        dout_pairs(BLOCK / PAIR * H), ds_pairs(BLOCK / PAIR * BLOCK), scores(BLOCK * BLOCK),
        dp(BLOCK * BLOCK), dq(H * BLOCK), dk(T_ * H), dv(T_ * H), lse(BLOCK), delta(BLOCK) {}

  void begin(Lines<T> k, Lines<T> v) {
    for (int64_t t = 0; t < T_; ++t) {
      std::memcpy(&keys[t * H], k.at(t), sizeof(T) * H);
      std::memcpy(&values[t * H], v.at(t), sizeof(T) * H);
      for (int64_t h = 0; h < H; ++h) keys_as_columns[h * ld_T + t] = k.at(t)[h];
    }
    std::fill(dk.begin(), dk.end(), 0.0f);
    std::fill(dv.begin(), dv.end(), 0.0f);
  }
  void take_queries(Lines<T> q, Lines<T> dout, Lines<T> out, int64_t i, int64_t M) {
    as_columns(q.at(i), q.stride, M, H, q_columns.data());
    as_columns(dout.at(i), dout.stride, M, H, dout_columns.data());
    in_pairs(q.at(i), q.stride, M, H, q_pairs.data());
    in_pairs(dout.at(i), dout.stride, M, H, dout_pairs.data());
    for (int64_t m = 0; m < M; ++m) {
      const T *d = dout.at(i + m), *o = out.at(i + m);
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t h = 0; h < H; ++h) sum += wide(d[h]) * wide(o[h]);
      delta[m] = sum;
    }
  }
  void block(int64_t i, int64_t M, int64_t j, float scale) {
    const int64_t L = std::min(BLOCK, T_ - j), even_L = L + L % 2, even_M = M + M % 2;
    multiply(L, M, H, &keys[j * H], H, q_columns.data(), BLOCK, scores.data(), BLOCK, false);
    multiply(L, M, H, &values[j * H], H, dout_columns.data(), BLOCK, dp.data(), BLOCK, false);
    if (even_M > M)  // a last query of zeros
      for (int64_t l = 0; l < L; ++l) p[l * BLOCK + M] = ds[l * BLOCK + M] = 0;
    (j == i ? through_softmax<true, T, W> : through_softmax<false, T, W>)(
        scores.data(), dp.data(), lse.data(), delta.data(), scale, L, M, p.data(), ds.data(),
        ds_pairs.data());
    multiply(L, H, even_M, p.data(), BLOCK, dout_pairs.data(), H, &dv[j * H], H, true);
    multiply(L, H, even_M, ds.data(), BLOCK, q_pairs.data(), H, &dk[j * H], H, true);
    multiply(H, M, even_L, &keys_as_columns[j], ld_T, ds_pairs.data(), BLOCK, dq.data(), BLOCK,
             j > 0);
  }
};
struct Strides { int64_t b, n, t; };
template <typename T>
static void gradients(const T* dout, const T* q, const T* k, const T* v, const T* out,
                      const float* lse, T* dq, T* dk, T* dv, int64_t B, int64_t N, int64_t K,
                      int64_t tokens, int64_t H, const Strides* of, float scale) {
  const auto head_of = [&](const T* x, int which, int64_t b, int64_t n) {
    return Lines<T>{x + b * of[which].b + n * of[which].n, of[which].t};
  };
#pragma omp parallel
  {
    Head<T> x(tokens, H);
#pragma omp for schedule(dynamic)
    for (int64_t each = 0; each < B * K; ++each) {
      const int64_t b = each / K, head = each % K, first = head * (N / K), last = first + N / K;
      x.begin(head_of(k, 2, b, head), head_of(v, 3, b, head));
      for (int64_t n = first; n < last; ++n)
        for (int64_t i = 0; i < tokens; i += BLOCK) {
          const int64_t M = std::min(BLOCK, tokens - i);
          x.take_queries(head_of(q, 1, b, n), head_of(dout, 0, b, n), head_of(out, 4, b, n), i, M);
          for (int64_t m = 0; m < M; ++m)
            x.lse[m] = lse[b * of[5].b + n * of[5].n + (i + m) * of[5].t];
          for (int64_t j = 0; j <= i; j += BLOCK) x.block(i, M, j, scale);
          for (int64_t m = 0; m < M; ++m)
            for (int64_t h = 0; h < H; ++h)
              narrow(x.dq[h * BLOCK + m], dq + ((b * tokens + i + m) * N + n) * H + h);
        }
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < H; ++h) {
          narrow(x.dk[t * H + h], dk + ((b * tokens + t) * K + head) * H + h);
          narrow(x.dv[t * H + h], dv + ((b * tokens + t) * K + head) * H + h);
        }
    }
    at::native::cpublas::brgemm_release(sizeof(T) == 2);
  }
}
#define STRIDES(X) int64_t X##_b, int64_t X##_n, int64_t X##_t
#define DEFINE(NAME, T)                                                                          \
  extern "C" void gradients_##NAME(                                                              \
      const T* dout, const T* q, const T* k, const T* v, const T* out, const float* lse, T* dq,  \
      T* dk, T* dv, int64_t B, int64_t N, int64_t K, int64_t tokens, int64_t H, STRIDES(dout),   \
      STRIDES(q), STRIDES(k), STRIDES(v), STRIDES(out), STRIDES(lse), double scale) {            \
    const Strides of[] = {{dout_b, dout_n, dout_t}, {q_b, q_n, q_t},       {k_b, k_n, k_t},      \
                          {v_b, v_n, v_t},          {out_b, out_n, out_t}, {lse_b, lse_n, lse_t}}; \
    gradients(dout, q, k, v, out, lse, dq, dk, dv, B, N, K, tokens, H, of, float(scale));        \
  }                                                                                              \
  extern "C" void probe_##NAME(const T* x, const Word<T>::type* words, float* product, double) { \
    try {                                                                                        \
      multiply(4, 4, 16, x, 16, words, 4, product, 4, false);                                    \
      at::native::cpublas::brgemm_release(sizeof(T) == 2);                                       \
    } catch (...) { /* it says so where it has none; the product stays zero */                   \
    }                                                                                            \
  }
DEFINE(bfloat16, bf16)
DEFINE(float32, float)
""",
)
