"""What strict numerics have to know of ATen's operators: which of them see where a row stands.

Measured with torch 2.13 on CPUs with AVX-512, float32, bfloat16 and float16, 1 and 2 threads, by
`tests/compiler/test_strict_operators.py`, which measures again wherever it runs.
"""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


VECTORS = _names(
    """
    atan2 cosh elu elu_backward exp2 gelu gelu_backward mish mish_backward pow rsqrt sigmoid silu
    silu_backward sinh softplus softplus_backward
    """
)
"""Pointwise kernels whose last elements differ in some dtype; starts and ends of all threads' parts
at multiples of 64 elements make them equal. gelu: tanh in all dtypes, erf in float16 only. rsqrt:
only in two-byte dtypes. pow: see EXACT_POWERS."""

SCALED_SUMS = _names(
    """
    add rsub sub
    """
)
"""Likewise, with an `alpha` other than 1, in two-byte dtypes."""

EXACT_POWERS = (0, 1, 2, 3)
"""Exponents for which `pow` multiplies."""

POINTWISE = _names(
    """
    _to_copy abs add addcdiv addcmul atan ceil clamp clamp_max clamp_min copy cos div erf erfc exp
    expm1 floor fmod hardswish hardswish_backward hypot leaky_relu leaky_relu_backward lerp log
    log1p log2 log_sigmoid_backward log_sigmoid_forward maximum minimum mul
    native_dropout_backward neg reciprocal relu remainder round rsub sigmoid_backward sign sin
    sqrt sub tanh tanh_backward threshold_backward where
    """
)
"""Pointwise operators whose results do not depend on the place."""

ROWS = _names(
    """
    _fused_rms_norm _log_softmax _log_softmax_backward_data _safe_softmax _softmax
    _softmax_backward_data amax amin cumsum logsumexp mean native_layer_norm
    native_layer_norm_backward prod sum var
    """
)
"""Sums and the like over the last dim: a row's result does not depend on the others. Over another
dim, the tokens, they are whole."""

MOVES = _names(
    """
    _unsafe_view arange cat clone constant_pad_nd contiguous embedding empty empty_like eye fill
    flip full full_like gather index index_select lift_fresh_copy masked_fill new_empty new_full
    new_ones new_zeros ones ones_like repeat roll scalar_tensor scatter select_backward
    select_scatter slice_backward slice_scatter sort split split_with_sizes stack topk tril triu
    zeros zeros_like
    """
)
"""Values are copied or made, not computed. Views are known by their schema."""

OVER_TOKENS = _names(
    """
    embedding_dense_backward index_add index_put mse_loss mse_loss_backward nll_loss_backward
    nll_loss_forward scatter_add
    """
)
"""One whole operation over all tokens: losses, and gradients of tables."""
