"""What CUDA's kernels allocate beside their results, by hand from their C++."""

import torch

from plait.dryrun.workspace import Workspace

# Shapes: B batch, N query heads, K key-value heads, T tokens, H head size, V vocabulary, D width.


def _attention_backward(kernel, *, tokens, kv_heads, dtype=torch.bfloat16):
    q_BNTH = torch.empty(2, 4, tokens, 128, dtype=dtype, device="meta")
    k_BKTH = torch.empty(2, kv_heads, tokens, 128, dtype=dtype, device="meta")
    given = (q_BNTH, q_BNTH, k_BKTH, k_BKTH)
    return Workspace()(f"aten._scaled_dot_product_{kernel}_backward.default", given, {}, None)


def test_flash_attention_sums_gradients_of_queries_in_float32():
    whole = _attention_backward("flash_attention", tokens=100, kv_heads=4)
    assert whole == 4 * (2 * 4 * 128) * (128 + 1)


def test_shared_keys_have_gradients_of_each_query_head_first():
    shared, own = (
        _attention_backward("flash_attention", tokens=128, kv_heads=count) for count in (1, 4)
    )
    assert shared - own == 2 * (2 * 4 * 128 * 128) * 2
    assert _attention_backward("cudnn_attention", tokens=128, kv_heads=1) == shared


def test_efficient_attention_needs_row_sums_alone_in_float32():
    kernel = "efficient_attention"
    wide = _attention_backward(kernel, tokens=128, kv_heads=4, dtype=torch.float32)
    assert wide == 4 * (2 * 4 * 128)
    assert _attention_backward(kernel, tokens=128, kv_heads=4) == 129 * wide


def test_an_embedding_sums_ten_rows_at_a_time_on_a_gpu():
    def needed(count, num_weights, device="meta"):
        gradient_TD = torch.empty(count, 64, dtype=torch.bfloat16, device=device)
        tokens_T = torch.empty(count, dtype=torch.int64, device=device)
        given = (gradient_TD, tokens_T, num_weights, -1, False)
        return Workspace()("aten.embedding_dense_backward.default", given, {}, None)

    assert needed(3072, 1000) == 0
    assert needed(4000, 1000, device="cpu") == 0
    partial = 400 + 1000
    assert needed(4000, 1000) == 4 * partial * 64 + 8 * (3 * 4000 + 2 * 1000 + partial)
