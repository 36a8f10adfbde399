"""The model is one graph: what a compiler needs to see it whole."""

import pytest
import torch

from plait.models.decoder import Decoder, DecoderConfig

TINY = DecoderConfig(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    max_positions=32,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_loss_are_captured_without_a_break(dtype):
    model = Decoder(TINY)
    model.initialize(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))

    def loss(tokens):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            hidden = model(tokens[:, :-1])
        return model.loss(hidden, tokens[:, 1:], dtype=dtype)

    expected = loss(tokens)
    expected_gradients = torch.autograd.grad(expected, list(model.parameters()))
    captured = torch.compile(loss, backend="aot_eager", fullgraph=True)(tokens)
    gradients = torch.autograd.grad(captured, list(model.parameters()))
    # The same kernels in the same order; aot_eager may only reorder the sums of shared gradients.
    torch.testing.assert_close(captured, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-2, atol=1e-3)


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model = Decoder(TINY)
    model.initialize(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    hidden = model(tokens[:, :-1])
    logits = model.logits(hidden).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(model.loss(hidden, tokens[:, 1:]), expected)
