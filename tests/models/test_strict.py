"""A model in strict numerics: the same bits in any batch, chunk, cache and split of rows."""

from dataclasses import replace

import pytest
import torch

from plait.checkpoint.huggingface import load_model, write_model
from plait.errors import ModelError
from plait.models.decoder import Decoder, DecoderConfig, DecoderLayer
from plait.nn.attention import AttentionInputs
from plait.nn.rotary import rotation_tables
from plait.nn.token_layout import TokenLayout

FAST = DecoderConfig(
    family="qwen3",
    qk_norm=True,
    vocab_size=101,
    hidden_size=96,
    intermediate_size=200,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_size=32,
    max_positions=256,
)
STRICT = replace(FAST, numerics="strict")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(params=["float32-1", "bfloat16-1", "float32-2"])
def dtype(request):
    """Set the number of threads behind the dash, and give the dtype before it."""
    name, num_threads = request.param.split("-")
    before = torch.get_num_threads()
    torch.set_num_threads(int(num_threads))
    yield DTYPES[name]
    torch.set_num_threads(before)


def _model(config, dtype=torch.float32):
    model = Decoder(config)
    model.initialize(torch.Generator().manual_seed(0))
    return model.to(dtype)


def _tokens(batch, length):
    return torch.randint(0, 101, (batch, length), generator=torch.Generator().manual_seed(1))


def _layer_results(layer, x, dout, config):
    """Output and input gradient of one decoder layer."""
    x = x.clone().requires_grad_()
    tables = rotation_tables(config.rope, torch.arange(x.shape[1])[None], config.head_size)
    output = layer(x, AttentionInputs(*tables, None, None))
    return output.detach(), torch.autograd.grad(output, x, dout)[0]


def test_a_layer_gives_each_row_of_the_batch_the_same_bits_and_gradient(dtype):
    torch.manual_seed(0)
    layer = DecoderLayer(STRICT, 0).to(dtype)
    x, dout = (torch.randn(7, 40, 96).to(dtype) for _ in range(2))
    output, dx = _layer_results(layer, x, dout, STRICT)
    for rows in ([6], [5, 4, 0, 2]):
        some_output, some_dx = _layer_results(layer, x[rows], dout[rows], STRICT)
        assert torch.equal(some_output, output[rows])
        assert torch.equal(some_dx, dx[rows])


@torch.no_grad()
def test_chunks_cache_and_padding_give_the_bits_of_one_forward(dtype):
    model, tokens = _model(STRICT, dtype), _tokens(3, 150)
    expected = model.logits(model(tokens))
    for parts in ([128, 22], [1, 1, 35, 100, 13]):
        cache = model.make_cache(batch_size=3, capacity=211)
        chunks = [model(part, cache=cache) for part in tokens.split(parts, dim=1)]
        assert torch.equal(model.logits(torch.cat(chunks, dim=1)), expected), parts
    padded = torch.nn.functional.pad(tokens[1:2, :90], (0, 50))
    assert torch.equal(model.logits(model(padded)[:, :90]), expected[1:2, :90])


@torch.no_grad()
def test_decoding_token_by_token_gives_the_bits_of_one_forward(dtype):
    model, tokens = _model(STRICT, dtype), _tokens(2, 40)
    cache = model.make_cache(batch_size=2, capacity=40)
    steps = [model(tokens[:, i : i + 1], cache=cache) for i in range(40)]
    assert torch.equal(torch.cat(steps, dim=1), model(tokens))


def test_strict_and_fast_differ_by_rounding_only():
    tokens = _tokens(2, 60)
    fast, strict = _model(FAST), _model(STRICT)
    results = []
    for model in (fast, strict):
        loss = model.loss(model(tokens), tokens)
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert fast.state_dict().keys() == strict.state_dict().keys()
    for mine, theirs in zip(*results, strict=True):
        # Float32 sums in another order, over two layers.
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_forward_and_backward_are_captured_without_a_break(dtype):
    model, tokens = _model(STRICT), _tokens(2, 9)

    def loss(tokens):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            hidden = model(tokens[:, :-1])
        return model.loss(hidden, tokens[:, 1:], dtype=dtype)

    expected = loss(tokens)
    captured = torch.compile(loss, backend="aot_eager", fullgraph=True)(tokens)
    torch.testing.assert_close(captured, expected, rtol=1e-6, atol=0)
    parameters = list(model.parameters())
    # aot_eager may only reorder the sums of shared gradients.
    torch.testing.assert_close(
        torch.autograd.grad(captured, parameters),
        torch.autograd.grad(expected, parameters),
        rtol=1e-2,
        atol=1e-3,
    )


@torch.no_grad()
def test_a_saved_model_is_loaded_in_either_numerics(tmp_path):
    model, tokens = _model(STRICT), _tokens(1, 30)
    write_model(model, tmp_path)
    assert load_model(tmp_path).config == FAST
    assert torch.equal(load_model(tmp_path, numerics="strict")(tokens), model(tokens))


def test_packed_documents_are_refused():
    layout = TokenLayout(segments=torch.zeros(1, 5))
    with pytest.raises(ModelError, match="strict numerics takes no layout with segments yet"):
        _model(STRICT)(_tokens(1, 5), layout)
