"""The strict linear layer: right, differentiable, and blind to a row's neighbours."""

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops.row_exact import Product, is_row_exact
from plait.ops.strict_linear import strict_linear
from plait.ops.strict_silu import strict_silu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDTHS = {"64x64": (64, 64), "320x896": (320, 896), "odd-7x5": (7, 5), "odd-101x33": (101, 33)}


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _inputs(num_rows, widths, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_rows, widths[0]), (widths[1], widths[0]), (widths[1],)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def _output_and_input_gradient(x, weight, dy):
    x = x.detach().requires_grad_()
    y = strict_linear(x, weight)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_a_row_does_not_depend_on_number_order_or_neighbours(widths, dtype, num_threads):
    x, weight, _ = _inputs(700, widths, dtype)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(700, widths[1], generator=generator).to(dtype)
    y, dx = _output_and_input_gradient(x, weight, dy)
    for num_rows in [1, 3, 16, 17, 65, 127, 300, 513]:
        rows = torch.randperm(700, generator=generator)[:num_rows]
        some_y, some_dx = _output_and_input_gradient(x[rows], weight, dy[rows])
        assert torch.equal(some_y, y[rows]), num_rows
        assert torch.equal(some_dx, dx[rows]), num_rows


def test_rows_at_unaligned_addresses_give_the_same_bits(dtype):
    x, weight, _ = _inputs(40, (64, 64), dtype)
    elsewhere = [torch.empty(t.numel() + 1, dtype=dtype)[1:].view(t.shape) for t in (x, weight)]
    for place, tensor in zip(elsewhere, (x, weight), strict=True):
        place.copy_(tensor.detach())
    assert torch.equal(strict_linear(*elsewhere), strict_linear(x, weight))


def test_output_and_gradients_equal_float64(dtype):
    inputs = _inputs(150, (101, 33), dtype)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    dy = torch.randn(150, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = strict_linear(*inputs)
    exact = torch.nn.functional.linear(*exact_inputs)
    found = [y, *torch.autograd.grad(y, inputs, dy)]
    expected = [exact, *torch.autograd.grad(exact, exact_inputs, dy.double())]
    # Float32 sums of up to 150 products, one rounding to the dtype, and the bias added after it.
    eps = 4 * torch.finfo(dtype).eps
    for mine, truth in zip(found, expected, strict=True):
        assert (mine - truth).abs().max() <= eps * truth.abs().max()


def test_the_gradient_agrees_with_finite_differences():
    inputs = [t.detach().double().requires_grad_() for t in _inputs(5, (6, 4), torch.float32)]
    assert torch.autograd.gradcheck(strict_linear, inputs)


def test_autocast_converts_as_for_torch_linear():
    x, weight, bias = _inputs(20, (64, 64), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = strict_linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, strict_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


def test_dims_before_the_last_are_kept_and_no_rows_are_no_error():
    x, weight, _ = _inputs(24, (64, 64), torch.float32)
    assert torch.equal(
        strict_linear(x.view(2, 3, 4, 64), weight), strict_linear(x, weight).view(2, 3, 4, 64)
    )
    assert strict_linear(x[:0], weight).shape == (0, 64)


def test_the_operators_keep_the_rules_of_torch_library():
    x, weight, _ = _inputs(20, (64, 32), torch.float32)
    opcheck(torch.ops.plait.strict_linear.default, (x, weight))
    opcheck(torch.ops.plait.strict_silu.default, (x,))


def test_a_whole_graph_is_captured_with_the_same_bits():
    x, weight, bias = _inputs(37, (64, 64), torch.float32)

    def run(x):
        return strict_silu(strict_linear(x, weight, bias)).square().sum()

    captured = torch.compile(run, backend="aot_eager", fullgraph=True)
    expected, found = run(x), captured(x)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, x)[0], torch.autograd.grad(expected, x)[0])


def test_silu_of_a_value_does_not_depend_on_its_place(dtype, num_threads):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(150_000, generator=generator) * 4).to(dtype).requires_grad_()
    dy = torch.randn(150_000, generator=generator).to(dtype)
    y = strict_silu(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    for start, stop in [(0, 7), (3, 1000), (11, 149_999), (70_001, 140_002)]:
        part = x[start:stop].detach().requires_grad_()
        part_y = strict_silu(part)
        assert torch.equal(part_y, y[start:stop])
        assert torch.equal(torch.autograd.grad(part_y, part, dy[start:stop])[0], dx[start:stop])


def test_silu_and_its_gradient_equal_pytorch(dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.cat((torch.randn(1000, generator=generator) * 5, torch.tensor([-200.0, 200.0])))
    x = values.to(dtype).requires_grad_()
    dy = torch.ones_like(x)
    exact_x = x.detach().double().requires_grad_()
    exact = torch.nn.functional.silu(exact_x)
    # A few roundings in float32, then one to the dtype.
    tolerance = {"rtol": max(1e-6, torch.finfo(dtype).eps), "atol": 1e-6}
    torch.testing.assert_close(strict_silu(x).double(), exact, **tolerance)
    torch.testing.assert_close(
        torch.autograd.grad(strict_silu(x), x, dy)[0].double(),
        torch.autograd.grad(exact, exact_x, dy.double())[0],
        **tolerance,
    )


def test_the_probe_tells_other_orders_of_summation_apart(monkeypatch):
    product = Product(
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        num_threads=torch.get_num_threads(),
        precision=torch.get_float32_matmul_precision(),
        num_matrices=None,
        inner=64,
        columns=48,
        is_transposed=False,
        reference_rows=32,
    )
    assert is_row_exact.__wrapped__(product, 16)
    plain = torch.mm

    def backwards_in_small_tiles(x, w):
        return plain(x.flip(1), w.flip(0)) if x.shape[0] < 32 else plain(x, w)

    monkeypatch.setattr(torch, "mm", backwards_in_small_tiles)
    assert not is_row_exact.__wrapped__(product, 16)


def test_the_probe_tells_kernels_apart_that_sum_one_half_after_the_other(monkeypatch):
    product = Product(
        dtype=torch.float32,
        device=torch.device("cpu"),
        num_threads=torch.get_num_threads(),
        precision=torch.get_float32_matmul_precision(),
        num_matrices=None,
        inner=64,
        columns=48,
        is_transposed=False,
        reference_rows=32,
    )
    plain = torch.mm

    def by_halves(x, w):
        halves = [(x[:, :32], w[:32]), (x[:, 32:], w[32:])]
        if x.shape[0] < 32:  # each backwards
            halves = [(a.flip(1), b.flip(0)) for a, b in halves]
        return sum(plain(a.contiguous(), b.contiguous()) for a, b in halves)

    monkeypatch.setattr(torch, "mm", by_halves)
    assert is_row_exact.__wrapped__(product, 32)
    assert not is_row_exact.__wrapped__(product, 16)


def test_inputs_that_do_not_fit_are_refused_by_name():
    x, weight, bias = _inputs(4, (8, 6), torch.float32)
    with pytest.raises(ModelError, match=r"cannot multiply \(4, 8\) by the transpose of \(8, 6\)"):
        strict_linear(x, weight.t())
    with pytest.raises(ModelError, match=r"a bias of shape \(5,\).*must have 6 elements"):
        strict_linear(x, weight, bias[:5])
    with pytest.raises(ModelError, match=r"one floating-point dtype, got torch.float32, torch.bfl"):
        strict_linear(x, weight.bfloat16())
    with pytest.raises(ModelError, match=r"one floating-point dtype, got torch.int64"):
        strict_linear(x.long(), weight.long())
    with pytest.raises(ModelError, match="on one device, got cpu, meta"):
        strict_linear(x, weight.to("meta"))
