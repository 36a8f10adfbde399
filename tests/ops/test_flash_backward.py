"""The backward of causal attention on a CPU against float64, beside PyTorch's own kernel."""

import pytest
import torch
from torch.library import opcheck

from plait.ops import flash_backward as module
from plait.ops.numerics import bfloat16_pays

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_ours = torch.ops.plait.flash_backward
needs_units = pytest.mark.skipif(
    not bfloat16_pays("cpu"), reason="this CPU has no units for bfloat16; PyTorch's kernel is taken"
)


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch):
    """Small operands are taken too."""
    monkeypatch.setattr(module, "_SMALLEST_COMPILED", 0)


TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 2e-6}
"""In bfloat16 probabilities and gradients of scores are rounded to 2^-9 before products; float32
sums of hundreds of terms that are each rounded to 2^-24."""


def operands(batch, heads, kv_heads, tokens, size, *, dtype=torch.bfloat16, is_transposed=True):
    """dout, q, k, v, out, logsumexp and scale; heads behind tokens in memory, as models have it."""
    generator = torch.Generator().manual_seed(tokens)

    def draw(num_heads):
        x = torch.randn(batch, tokens, num_heads, size, generator=generator).to(dtype)
        return x.transpose(1, 2) if is_transposed else x.transpose(1, 2).contiguous()

    q, k, v, dout = draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)
    scale = size**-0.5
    out, logsumexp = _flash(q, k, v, 0.0, True, scale=scale)
    return dout, q, k, v, out, logsumexp, scale


def errors(gradients, given):
    """Relative, by norm, of the gradients of q, k and v."""
    dout, q, k, v, _, _, scale = given
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *wide, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    exact = torch.autograd.grad(out, wide, dout.double())
    return [
        float((x.double() - truth).norm() / truth.norm())
        for x, truth in zip(gradients, exact, strict=True)
    ]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 4, 4, 256, 64),
        (2, 4, 2, 131, 64),
        (1, 6, 2, 300, 128),
        (2, 2, 1, 1, 32),
        (1, 1, 1, 7, 6),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_formula(sizes, dtype, num_threads):
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        given = operands(*sizes, dtype=dtype)
        found = _ours(*given)
    finally:
        torch.set_num_threads(before)
    if sizes[3] == 1:  # a lone token looks at itself alone, whatever queries and keys are
        assert max(x.float().abs().max() for x in found[:2]) < 1e-5
        value = given[0].double().sum(1, keepdim=True)
        assert (found[2] - value).norm() < TOLERANCE[dtype] * value.norm()
    else:
        assert max(errors(found, given)) < TOLERANCE[dtype]


@needs_units
def test_it_is_closer_to_the_formula_than_pytorchs_kernel():
    given = operands(1, 16, 4, 512, 64)
    theirs = _flash_backward(*given[:6], 0.0, True, scale=given[6])
    mine, other = errors(_ours(*given), given), errors(theirs, given)
    assert all(x < 1.1 * y for x, y in zip(mine, other, strict=True))
    assert sum(mine) < 0.7 * sum(other)


@needs_units
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_kernel_is_taken_where_it_serves_and_the_probe_multiplies(dtype):
    assert module._multiplies(dtype)
    assert module._kernel._library, "no compiler"


@pytest.mark.parametrize("is_transposed", [True, False])
def test_it_keeps_the_rules_and_the_layout_of_pytorchs(is_transposed):
    given = operands(2, 4, 2, 40, 16, is_transposed=is_transposed)
    opcheck(_ours.default, given)
    theirs = _flash_backward(*given[:6], 0.0, True, scale=given[6])
    assert [x.stride() for x in _ours(*given)] == [x.stride() for x in theirs]


def test_a_gradient_whose_last_dim_is_strided_is_taken():
    dout, *given = operands(1, 2, 2, 64, 16)
    strided = dout.transpose(2, 3).contiguous().transpose(2, 3)
    for x, y in zip(_ours(dout, *given), _ours(strided, *given), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("what", "instead"), [("_multiplies", lambda dtype: False), ("_SMALLEST_COMPILED", 2**14)]
)
def test_without_a_product_of_blocks_or_of_few_pytorchs_kernel_is_taken(what, instead, monkeypatch):
    monkeypatch.setattr(module, what, instead)
    given = operands(1, 2, 2, 64, 16)
    theirs = _flash_backward(*given[:6], 0.0, True, scale=given[6])
    assert all(torch.equal(x, y) for x, y in zip(_ours(*given), theirs, strict=True))
