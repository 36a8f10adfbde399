"""Causal attention against its textbook formula."""

import pytest
import torch
from torch.library import opcheck

from plait.ops.attention import causal_attention, reference_causal_attention

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
