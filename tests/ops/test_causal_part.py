"""Attention of the last queries, against that of all: results and gradients of parts make both."""

import pytest
import torch

import plait.ops.attention as _registers_blocked  # noqa: F401
import plait.ops.causal_part as _registers_parts  # noqa: F401
import plait.ops.strict_attention as _registers_strict  # noqa: F401

_plait = torch.ops.plait
SCALE = 0.25


def drawn(num_tokens, dtype=torch.float64):
    """Queries of four heads, keys and values of two, and a gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, num_tokens, num_heads, 16) for num_heads in (4, 2, 2, 4)]
    return [torch.randn(x, generator=generator, dtype=dtype).transpose(1, 2) for x in shapes]


def whole(q, k, v, dout):
    """The textbook formula, and autograd's gradients of it."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    k_each, v_each = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = q @ k_each.mT * SCALE
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(later, float("-inf")).softmax(-1) @ v_each
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def by_flash(q, k, v, dout):
    out, lse = _plait.causal_part_attention(q, k, v, SCALE)
    return out, _plait.causal_part_attention_backward(dout, q, k, v, out, lse, SCALE)


def by_blocks(q, k, v, dout):
    backward = _plait.blocked_causal_attention_backward
    return _plait.blocked_causal_attention(q, k, v, SCALE), backward(dout, q, k, v, SCALE)


def by_strict_blocks(q, k, v, dout):
    backward = _plait.strict_causal_attention_backward
    return _plait.strict_causal_attention(q, k, v, SCALE), backward(dout, q, k, v, SCALE)


@pytest.mark.parametrize("run", [by_flash, by_blocks, by_strict_blocks])
@pytest.mark.parametrize("ends", [(150,), (64, 150), (1, 70, 149, 150)], ids=str)
def test_parts_make_the_whole_attention_and_its_gradients(run, ends):
    # The blocked kernels sum in float32 or wider; float64 leaves only the order of sums.
    q, k, v, dout = drawn(150, torch.float32 if run is by_strict_blocks else torch.float64)
    expected = whole(q, k, v, dout)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    start, outs, dqs = 0, [], []
    for end in ends:
        part = [x[:, :, start:end] for x in (q, dout)]
        out, (dq, dk_part, dv_part) = run(part[0], k[:, :, :end], v[:, :, :end], part[1])
        dk[:, :, :end] += dk_part
        dv[:, :, :end] += dv_part
        outs.append(out)
        dqs.append(dq)
        start = end
    found = (torch.cat(outs, 2), torch.cat(dqs, 2), dk, dv)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-5)  # blocked sums are float32


def test_the_operators_describe_what_they_make():
    q, k, v, dout = drawn(40)
    q, dout = q[:, :, 24:], dout[:, :, 24:]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(_plait.causal_part_attention.default, (q, k, v, SCALE), test_utils=checks)
    out, lse = _plait.causal_part_attention(q, k, v, SCALE)
    args = (dout, q, k, v, out, lse, SCALE)
    torch.library.opcheck(_plait.causal_part_attention_backward.default, args, test_utils=checks)
