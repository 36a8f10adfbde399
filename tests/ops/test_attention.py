"""Causal attention against its textbook formula."""

from functools import partial

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops.attention import causal_attention, causal_pairs, reference_causal_attention

SHAPES = {
    "one-block": (2, 4, 4, 60, 16),
    "several-blocks": (1, 3, 3, 300, 32),
    "grouped": (2, 6, 2, 200, 16),
    "one-key-head": (1, 4, 1, 129, 8),
    "one-token": (3, 2, 2, 1, 8),
}


def _inputs(shape, dtype):
    batch, heads, kv_heads, tokens, size = shape
    generator = torch.Generator().manual_seed(0)

    def draw(num_heads):
        values = torch.randn(batch, num_heads, tokens, size, generator=generator)
        return values.to(dtype).requires_grad_()

    return draw(heads), draw(kv_heads), draw(kv_heads)


def _blocked(q, k, v, *, scale):
    return torch.ops.plait.blocked_causal_attention(q, k, v, scale)


WINDOWS = {"in a block": 40, "a block": 128, "over blocks": 150, "one token": 1}


def _gradients(function, inputs, doutput):
    output = function(*inputs, scale=0.3)
    return output, torch.autograd.grad(output, inputs, doutput)


@pytest.mark.parametrize("function", [_blocked, causal_attention])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_equals_the_formula_forward_and_backward(shape, function):
    inputs = _inputs(shape, torch.float32)
    doutput = torch.randn_like(inputs[0], requires_grad=False)
    output, gradients = _gradients(function, inputs, doutput)
    expected, expected_gradients = _gradients(reference_causal_attention, inputs, doutput)
    # Float32 sums in another order.
    torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bfloat16_error_is_at_most_twice_that_of_the_formula_in_bfloat16(shape):
    inputs = _inputs(shape, torch.bfloat16)
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    doutput = torch.randn_like(inputs[0], requires_grad=False)
    _, exact = _gradients(reference_causal_attention, exact_inputs, doutput.double())
    _, plain = _gradients(reference_causal_attention, inputs, doutput)
    _, ours = _gradients(_blocked, inputs, doutput)
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        allowed = 2 * (theirs - truth).abs().mean() + 1e-6
        assert (mine - truth).abs().mean() <= allowed


def test_a_token_does_not_see_later_ones():
    q, k, v = (x.detach() for x in _inputs(SHAPES["several-blocks"], torch.float32))
    before = _blocked(q, k, v, scale=0.3)
    k[:, :, 200:], v[:, :, 200:] = 7.0, -7.0
    after = _blocked(q, k, v, scale=0.3)
    assert torch.equal(before[:, :, :200], after[:, :, :200])
    assert not torch.equal(before[:, :, 200:], after[:, :, 200:])


def test_non_contiguous_inputs_give_the_same_result():
    q, k, v = (x.detach() for x in _inputs(SHAPES["grouped"], torch.float32))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(_blocked(q, k, v, scale=0.3), _blocked(*strided, scale=0.3))


def test_the_operator_keeps_the_rules_of_torch_library():
    inputs = _inputs(SHAPES["grouped"], torch.float32)
    opcheck(torch.ops.plait.blocked_causal_attention.default, (*inputs, 0.3))


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("shape", [SHAPES["several-blocks"], SHAPES["grouped"]], ids=str)
def test_a_window_equals_the_formula_forward_and_backward(shape, window):
    inputs = _inputs(shape, torch.float64)
    doutput = torch.randn_like(inputs[0], requires_grad=False)
    ours = _gradients(partial(causal_attention, window=window), inputs, doutput)
    expected = _gradients(partial(reference_causal_attention, window=window), inputs, doutput)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)


def test_a_window_over_all_tokens_changes_no_bit():
    inputs = _inputs(SHAPES["grouped"], torch.float32)
    whole = causal_attention(*inputs, scale=0.3)
    assert torch.equal(causal_attention(*inputs, scale=0.3, window=200), whole)


def test_the_last_queries_see_their_window_of_all_keys():
    q, k, v = _inputs(SHAPES["several-blocks"], torch.float64)
    blocked = torch.ops.plait.blocked_causal_attention
    whole, part = blocked(q, k, v, 0.3, 70), blocked(q[:, :, 200:], k, v, 0.3, 70)
    torch.testing.assert_close(part, whole[:, :, 200:], atol=1e-12, rtol=1e-12)


def test_an_operator_with_a_window_keeps_the_rules_of_torch_library():
    inputs = _inputs(SHAPES["grouped"], torch.float32)
    opcheck(torch.ops.plait.blocked_causal_attention.default, (*inputs, 0.3, 50))


def test_pairs_of_a_window_are_those_that_a_mask_leaves():
    for num_queries, num_keys, window in ((7, 7, None), (7, 7, 3), (3, 8, 4), (3, 8, 7), (5, 6, 9)):
        ago = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
        seen = (ago >= 0) & (ago < (window or num_keys))
        assert causal_pairs(num_queries, num_keys, window) == seen.sum()


def test_shapes_and_windows_that_do_not_fit_are_refused():
    q = torch.zeros(1, 4, 8, 16)
    with pytest.raises(ModelError, match="queries \\(B, K \\* G, T, H\\)"):
        causal_attention(q, q[:, :3], q[:, :3], scale=1.0)
    with pytest.raises(ModelError, match="window of at least 1 token, got 0"):
        causal_attention(q, q, q, scale=1.0, window=0)
