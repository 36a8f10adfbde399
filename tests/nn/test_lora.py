"""Adapters against their formula; four-bit floats against their definition."""

import pytest
import torch
from torch import nn

from plait.errors import ModelError
from plait.models.decoder import Decoder, DecoderConfig
from plait.nn.lora import LoraLinear, LoraSettings, add_lora, lora_layers, merge_lora
from plait.ops.nf4 import dequantize_nf4, nf4_linear, quantize_nf4

TINY = DecoderConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_size=16,
    max_positions=32,
)


def _layer(**settings):
    torch.manual_seed(0)
    frozen = nn.Linear(24, 40)
    layer = LoraLinear(frozen, LoraSettings(rank=4, alpha=6.0, **settings))
    nn.init.normal_(layer.lora_B.weight)
    return layer, torch.randn(3, 5, 24)


@pytest.mark.parametrize("rank_stable", [False, True], ids=["by rank", "by its root"])
def test_an_adapter_adds_its_product_to_the_frozen_layer(rank_stable):
    layer, x = _layer(rank_stable=rank_stable)
    scale = 6.0 / (2 if rank_stable else 4)
    update = scale * layer.lora_B.weight @ layer.lora_A.weight
    expected = x @ (layer.weight + update).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merged()(x), expected)


def test_only_the_adapters_learn_and_nothing_changes_at_first():
    model = Decoder(TINY)
    model.initialize(torch.Generator().manual_seed(0))
    tokens = torch.arange(10)[None]
    before = model(tokens)
    names = add_lora(model, LoraSettings(rank=4, targets=("q_proj", "layers.1.mlp.up_proj")))
    assert names == [
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.mlp.up_proj",
    ]
    torch.testing.assert_close(model(tokens), before)
    model.loss(model(tokens), tokens).backward()
    learnt = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learnt == {f"{name}.lora_{half}.weight" for name in names for half in "AB"}


def test_merging_keeps_the_outputs_and_leaves_plain_layers():
    model = Decoder(TINY)
    model.initialize(torch.Generator().manual_seed(0))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    add_lora(model, LoraSettings(rank=4))
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B.weight, std=0.1)
    expected = model(torch.arange(10)[None])
    merge_lora(model)
    torch.testing.assert_close(model(torch.arange(10)[None]), expected, atol=1e-5, rtol=1e-4)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_a_target_that_matches_nothing_is_refused():
    with pytest.raises(ModelError, match=r"no linear layer is called 'qproj'\. Known: .*q_proj"):
        add_lora(Decoder(TINY), LoraSettings(targets=("qproj",)))


def test_four_bits_choose_the_nearest_of_sixteen_values():
    torch.manual_seed(0)
    weight = torch.randn(40, 24)
    matrix = quantize_nf4(weight)
    again = dequantize_nf4(matrix, weight.shape, torch.float32)
    blocks, found = weight.flatten().view(-1, 64), again.flatten().view(-1, 64)
    scales = found.abs().amax(dim=1) / blocks.abs().amax(dim=1)
    # Eight bits for the scales: half a step of a 127th of their spread.
    torch.testing.assert_close(scales, torch.ones(15), atol=0.02, rtol=0)
    # The widest gap between two values is 0.304 of the largest; half of it is the worst error.
    error = (found - blocks).abs() / blocks.abs().amax(dim=1, keepdim=True)
    assert error.max() < 0.304 / 2 + 0.02
    assert ((found - blocks).square().mean() / blocks.square().mean()).sqrt() < 0.1
    assert matrix.packed.numel() == weight.numel() / 2


def test_zeros_and_an_open_last_block_survive_four_bits():
    weight = torch.zeros(5, 7)
    assert torch.equal(dequantize_nf4(quantize_nf4(weight), weight.shape, torch.float32), weight)


def test_a_four_bit_layer_multiplies_by_what_it_holds():
    layer, x = _layer(quantize=True)
    x.requires_grad_()
    update = layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    expected = x @ (layer.frozen_weight() + update).T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    dout = torch.randn(3, 5, 40)
    learnt = (x, layer.lora_A.weight, layer.lora_B.weight)
    torch.testing.assert_close(
        torch.autograd.grad(layer(x), learnt, dout), torch.autograd.grad(expected, learnt, dout)
    )
    assert not any(p.numel() == 40 * 24 for p in layer.parameters())


def test_a_four_bit_product_keeps_nothing_large_for_its_backward():
    matrix = quantize_nf4(torch.randn(64, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nf4_linear(torch.randn(2, 64, requires_grad=True), matrix, 64, None)
    assert sum(t.numel() * t.element_size() for t in kept) < 64 * 64
