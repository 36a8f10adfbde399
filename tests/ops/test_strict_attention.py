"""Strict causal attention: right, and blind to batch, chunks, cache and later keys."""

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops.attention import reference_causal_attention
from plait.ops.strict_attention import strict_causal_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHAPES = {
    "one-block": (2, 4, 4, 60, 16),
    "several-blocks": (1, 3, 3, 300, 32),
    "grouped": (2, 6, 2, 200, 16),
    "one-key-head": (1, 4, 1, 129, 8),
    "one-token": (3, 2, 2, 1, 64),
}


@pytest.fixture(params=["float32-1", "bfloat16-1", "bfloat16-2"])
def dtype(request):
    """Set the number of threads behind the dash, and give the dtype before it."""
    name, num_threads = request.param.split("-")
    before = torch.get_num_threads()
    torch.set_num_threads(int(num_threads))
    yield DTYPES[name]
    torch.set_num_threads(before)


def _inputs(shape, dtype=torch.float32):
    batch, heads, kv_heads, tokens, size = shape
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(batch, n, tokens, size, generator=generator).to(dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )


def _gradients(function, inputs, doutput):
    output = function(*inputs, scale=0.3)
    return output, *torch.autograd.grad(output, inputs, doutput)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_equals_float64_forward_and_backward(shape):
    inputs = _inputs(shape)
    doutput = torch.randn_like(inputs[0], requires_grad=False)
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    found = _gradients(strict_causal_attention, inputs, doutput)
    expected = _gradients(reference_causal_attention, exact_inputs, doutput.double())
    for mine, truth in zip(found, expected, strict=True):
        # Sums of a few hundred float32 products.
        torch.testing.assert_close(mine.double(), truth, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bfloat16_error_is_at_most_twice_that_of_the_formula_in_bfloat16(shape):
    inputs = _inputs(shape, torch.bfloat16)
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    doutput = torch.randn_like(inputs[0], requires_grad=False)
    exact = _gradients(reference_causal_attention, exact_inputs, doutput.double())
    plain = _gradients(reference_causal_attention, inputs, doutput)
    ours = _gradients(strict_causal_attention, inputs, doutput)
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        allowed = 2 * (theirs - truth).abs().mean() + 1e-6
        assert (mine - truth).abs().mean() <= allowed


@pytest.mark.parametrize("heads", [(4, 4, 64), (6, 2, 16)], ids=["plain", "grouped"])
def test_a_query_does_not_depend_on_other_queries_later_keys_or_the_batch(dtype, heads):
    num_heads, num_kv_heads, size = heads
    inputs = _inputs((3, num_heads, num_kv_heads, 310, size), dtype)
    doutput = torch.randn_like(inputs[0], requires_grad=False)
    output, dq, _, _ = _gradients(strict_causal_attention, inputs, doutput)
    q, k, v = (x.detach() for x in inputs)
    spans = [(309, 310), (127, 129), (5, 290)]
    for start, stop in spans:
        for rows in (slice(0, 3), slice(2, 3)):
            part = (q[rows, :, start:stop].requires_grad_(), k[rows, :, :stop], v[rows, :, :stop])
            found = strict_causal_attention(*part, scale=0.3)
            (found_dq,) = torch.autograd.grad(found, part[0], doutput[rows, :, start:stop])
            assert torch.equal(found, output[rows, :, start:stop]), (start, stop)
            assert torch.equal(found_dq, dq[rows, :, start:stop]), (start, stop)


def test_keys_inside_a_larger_cache_give_the_same_bits():
    q, k, v = (x.detach() for x in _inputs((2, 4, 2, 150, 24)))
    expected = strict_causal_attention(q, k, v, scale=0.3)
    for capacity in (151, 173, 256):
        cache = torch.full((2, 2, 2, capacity, 24), float("nan"))
        cache[0, :, :, :150], cache[1, :, :, :150] = k, v
        held = cache[:, :, :, :150]
        assert torch.equal(strict_causal_attention(q, held[0], held[1], scale=0.3), expected)


def test_non_contiguous_queries_give_the_same_bits():
    inputs = tuple(x.detach() for x in _inputs(SHAPES["grouped"]))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert torch.equal(
        strict_causal_attention(*strided, scale=0.3), strict_causal_attention(*inputs, scale=0.3)
    )


def test_all_gradients_are_the_same_every_time(dtype):
    inputs = _inputs(SHAPES["grouped"], dtype)
    doutput = torch.randn_like(inputs[0], requires_grad=False)
    first = _gradients(strict_causal_attention, inputs, doutput)
    second = _gradients(strict_causal_attention, inputs, doutput)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_operator_keeps_the_rules_of_torch_library():
    q, k, v = _inputs((2, 4, 2, 20, 16))
    opcheck(torch.ops.plait.strict_causal_attention.default, (q, k, v, 0.3))
    last = q.detach()[:, :, 15:].requires_grad_()
    opcheck(torch.ops.plait.strict_causal_attention.default, (last, k, v, 0.3))


def test_inputs_that_do_not_fit_are_refused_by_name():
    q, k, v = _inputs((2, 4, 2, 20, 16))
    for wrong in [(q, k, v[:, :, 1:]), (q[:, :3], k, v), (q[..., :8], k, v), (q, k[:, :, 1:], v)]:
        with pytest.raises(ModelError, match=r"got queries .* It needs"):
            strict_causal_attention(*wrong, scale=0.3)
    with pytest.raises(ModelError, match="T at most S"):
        strict_causal_attention(q, k[:, :, :9], v[:, :, :9], scale=0.3)
    with pytest.raises(ModelError, match="one floating-point dtype"):
        strict_causal_attention(q, k.double(), v, scale=0.3)
