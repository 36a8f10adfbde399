"""Measures, on this machine, what strict numerics take for granted of ATen's operators."""

import pytest
import torch
from torch.nn import functional

from plait.compiler import strict_operators as known
from plait.ops.strict_pointwise import strict_pointwise

_aten = torch.ops.aten
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIZE = 2**17
PARTS = [
    (0, 7),
    (3, 1000),
    (64, 1064),
    (128, 191),
    (640, 737),
    (1, 40_001),
    (0, 65_600),
    (9, 99_999),
]

# Each operator as a function of up to three tensors of one shape: any values, any, positive.
POINTWISE = {
    "abs": lambda x, y, p: x.abs(),
    "add": lambda x, y, p: x + y,
    "addcdiv": lambda x, y, p: torch.addcdiv(x, y, p, value=0.3),
    "addcmul": lambda x, y, p: torch.addcmul(x, y, p, value=0.3),
    "atan": lambda x, y, p: x.atan(),
    "ceil": lambda x, y, p: x.ceil(),
    "clamp": lambda x, y, p: x.clamp(-1, 1),
    "clamp_max": lambda x, y, p: x.clamp_max(1),
    "clamp_min": lambda x, y, p: x.clamp_min(-1),
    "copy": lambda x, y, p: _aten.copy(x, y),
    "cos": lambda x, y, p: x.cos(),
    "div": lambda x, y, p: x / y,
    "erf": lambda x, y, p: x.erf(),
    "erfc": lambda x, y, p: x.erfc(),
    "exp": lambda x, y, p: x.exp(),
    "expm1": lambda x, y, p: x.expm1(),
    "floor": lambda x, y, p: x.floor(),
    "fmod": lambda x, y, p: x.fmod(y),
    "hardswish": lambda x, y, p: functional.hardswish(x),
    "hardswish_backward": lambda x, y, p: _aten.hardswish_backward(x, y),
    "hypot": lambda x, y, p: x.hypot(y),
    "leaky_relu": lambda x, y, p: functional.leaky_relu(x),
    "leaky_relu_backward": lambda x, y, p: _aten.leaky_relu_backward(x, y, 0.1, False),
    "lerp": lambda x, y, p: x.lerp(y, 0.3),
    "log": lambda x, y, p: p.log(),
    "log1p": lambda x, y, p: p.log1p(),
    "log2": lambda x, y, p: p.log2(),
    "log_sigmoid_backward": lambda x, y, p: _aten.log_sigmoid_backward(x, y, (-y.abs()).exp()),
    "log_sigmoid_forward": lambda x, y, p: functional.logsigmoid(x),
    "maximum": lambda x, y, p: x.maximum(y),
    "minimum": lambda x, y, p: x.minimum(y),
    "mul": lambda x, y, p: x * y,
    "native_dropout_backward": lambda x, y, p: _aten.native_dropout_backward(x, y > 0, 1.1),
    "neg": lambda x, y, p: -x,
    "reciprocal": lambda x, y, p: x.reciprocal(),
    "relu": lambda x, y, p: x.relu(),
    "remainder": lambda x, y, p: x.remainder(y),
    "round": lambda x, y, p: x.round(),
    "rsub": lambda x, y, p: torch.rsub(x, y),
    "sigmoid_backward": lambda x, y, p: _aten.sigmoid_backward(x, y),
    "sign": lambda x, y, p: x.sign(),
    "sin": lambda x, y, p: x.sin(),
    "sqrt": lambda x, y, p: p.sqrt(),
    "sub": lambda x, y, p: x - y,
    "tanh": lambda x, y, p: x.tanh(),
    "tanh_backward": lambda x, y, p: _aten.tanh_backward(x, y),
    "threshold_backward": lambda x, y, p: _aten.threshold_backward(x, y, 0.1),
    "where": lambda x, y, p: torch.where(x > 0, x, y),
    "_to_copy": lambda x, y, p: x.to(torch.bfloat16 if x.dtype == torch.float32 else torch.float32),
}
EXACT_POWERS = {
    f"pow {n}": lambda x, y, p, n=float(n): x.pow(n) for n in known.EXACT_POWERS
}  # fmt: skip

# Those run in whole vectors: overload, numbers, mode, and which of the tensors.
VECTORS = {
    "atan2": [("atan2.default", "xy", [], "")],
    "cosh": [("cosh.default", "x", [], "")],
    "elu": [("elu.default", "x", [1.0, 1.0, 1.0], "")],
    "elu_backward": [("elu_backward.default", "xy", [1.0, 1.0, 1.0, 0.0], "")],
    "exp2": [("exp2.default", "x", [], "")],
    "gelu": [("gelu.default", "x", [], mode) for mode in ("none", "tanh")],
    "gelu_backward": [("gelu_backward.default", "xy", [], mode) for mode in ("none", "tanh")],
    "mish": [("mish.default", "x", [], "")],
    "mish_backward": [("mish_backward.default", "xy", [], "")],
    "pow": [
        ("pow.Tensor_Tensor", "px", [], ""),
        ("pow.Scalar", "x", [1.7], ""),
        *(("pow.Tensor_Scalar", "p", [n], "") for n in (-0.5, -1.0, 0.5, 1.5, 4.0)),
    ],
    "rsqrt": [("rsqrt.default", "p", [], "")],
    "sigmoid": [("sigmoid.default", "x", [], "")],
    "silu": [("silu.default", "x", [], "")],
    "silu_backward": [("silu_backward.default", "xy", [], "")],
    "sinh": [("sinh.default", "x", [], "")],
    "softplus": [("softplus.default", "x", [1.0, 20.0], "")],
    "softplus_backward": [("softplus_backward.default", "xy", [1.0, 20.0], "")],
    "add": [("add.Tensor", "xy", [1.7], "")],
    "sub": [("sub.Tensor", "xy", [1.7], "")],
    "rsub": [("rsub.Tensor", "xy", [1.7], "")],
}
CALLS = [(*call,) for calls in VECTORS.values() for call in calls]

# Over the last dim of x, y (rows, width); p of one row.
ROWS = {
    "_fused_rms_norm": lambda x, y, w: _aten._fused_rms_norm(x, [x.shape[-1]], w, 1e-5)[0],
    "_log_softmax": lambda x, y, w: x.log_softmax(-1),
    "_log_softmax_backward_data": lambda x, y, w: _aten._log_softmax_backward_data(
        x, y.log_softmax(-1), -1, x.dtype
    ),
    "_safe_softmax": lambda x, y, w: _aten._safe_softmax(x, -1),
    "_softmax": lambda x, y, w: x.softmax(-1),
    "_softmax_backward_data": lambda x, y, w: _aten._softmax_backward_data(
        x, y.softmax(-1), -1, x.dtype
    ),
    "amax": lambda x, y, w: x.amax(-1),
    "amin": lambda x, y, w: x.amin(-1),
    "cumsum": lambda x, y, w: x.cumsum(-1),
    "logsumexp": lambda x, y, w: x.logsumexp(-1),
    "mean": lambda x, y, w: x.mean(-1),
    "native_layer_norm": lambda x, y, w: functional.layer_norm(x, (x.shape[-1],), w, w),
    "native_layer_norm_backward": lambda x, y, w: _aten.native_layer_norm_backward(
        y, x, [x.shape[-1]], *_aten.native_layer_norm(x, [x.shape[-1]], w, w, 1e-5)[1:], w, w,
        [True, True, True],
    )[0],
    "prod": lambda x, y, w: x.prod(-1),
    "sum": lambda x, y, w: x.sum(-1),
    "var": lambda x, y, w: x.var(-1),
}  # fmt: skip


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def values(request):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(SIZE, generator=generator) * 2 for _ in range(2))
    return [t.to(request.param) for t in (x, y, x.abs() + 1e-3)]


def have_same_bits(a, b):
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def unequal_parts(function, tensors):
    whole = function(*tensors)
    return [
        (start, stop)
        for start, stop in PARTS
        if not have_same_bits(
            function(*(t[start:stop].clone() for t in tensors)), whole[start:stop]
        )
    ]


def test_every_operator_in_the_tables_is_measured_here():
    assert set(POINTWISE) == known.POINTWISE
    assert set(VECTORS) == known.VECTORS | known.SCALED_SUMS
    assert set(ROWS) == known.ROWS


@pytest.mark.parametrize("name", [*POINTWISE, *EXACT_POWERS])
def test_a_pointwise_operator_left_alone_does_not_see_the_place(name, values, num_threads):
    function = (POINTWISE | EXACT_POWERS)[name]
    whole = function(*values)
    if whole.dtype == values[0].dtype:
        assert unequal_parts(function, values) == []
    else:
        assert have_same_bits(function(*(t[3:1000].clone() for t in values)), whole[3:1000])


@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call[0]}-{call[2]}-{call[3]}")
def test_in_whole_vectors_an_operator_does_not_see_the_place(call, values, num_threads):
    operator, names, numbers, mode = call
    tensors = [values["xyp".index(name)] for name in names]
    assert (
        unequal_parts(lambda *t: strict_pointwise(operator, list(t), numbers, mode), tensors) == []
    )


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16], indirect=True, ids=str)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("width", [64, 100, 1024])
def test_an_operator_over_rows_does_not_see_other_rows(name, width, values, num_threads):
    x, y, _ = (t[: 128 * width].view(128, width) for t in values)
    weight = y[0].clone()
    whole = ROWS[name](x, y, weight)
    for start, stop in [(0, 1), (5, 6), (0, 7), (64, 128), (1, 100), (33, 128)]:
        part = ROWS[name](x[start:stop].clone(), y[start:stop].clone(), weight)
        assert have_same_bits(part, whole[start:stop])


def attention(q, k, v, dout, is_causal):
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.clone())]


def attention_by_products(q, k, v, dout, is_causal):
    heads = q.shape[1]
    q, k, v, dout = (t.flatten(0, 1) for t in (q, k, v, dout))
    scores = torch.bmm(q, k.mT)
    weights = scores.softmax(-1)
    found = [scores, weights, torch.bmm(weights, v), torch.bmm(weights.mT, dout)]
    return [t.unflatten(0, (-1, heads)) for t in found]


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("function", [attention, attention_by_products])
@pytest.mark.parametrize("shape", [(4, 64, 16), (4, 130, 64), (3, 33, 32)], ids=str)
def test_attention_of_a_batch_element_does_not_see_the_others(
    function, shape, is_causal, values, num_threads
):
    count = 4 * shape[0] * shape[1] * shape[2]
    line = torch.cat(values)
    tensors = [line[i : i + count].view(4, *shape) for i in (0, 5, 90_000, 200_000)]
    whole = function(*tensors, is_causal)
    for rows in (slice(0, 1), slice(3, 4), slice(1, 3), slice(0, 3)):
        some = function(*(t[rows] for t in tensors), is_causal)
        for part, expected in zip(some, whole, strict=True):
            assert torch.equal(part, expected[rows])
