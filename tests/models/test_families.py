"""What is special about single families, and the ones that transformers does not have."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

import plait
from plait.checkpoint.huggingface import load_model, write_model
from plait.errors import ModelError
from plait.models.decoder import Decoder, DecoderConfig
from plait.models.registry import FAMILIES, check_family
from plait.nn.experts import ExpertFeedForward, ExpertSettings
from plait.nn.rotary import Rope
from plait.nn.token_layout import TokenLayout

from .tiny_families import make_reference

PANGU = {
    "architectures": ["PanguEmbeddedForCausalLM"],
    "model_type": "PanguEmbedded",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 16_000_000.0,
    "tie_word_embeddings": False,
    "bias": True,
}


def _pangu_leaves():
    """Random weights under the names of the published checkpoints."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens": (101, 32), "norm": (32,)}
    for layer in ("layers.0", "layers.1"):
        for name, size in {"q": 32, "k": 16, "v": 16, "o": 32}.items():
            shapes[f"{layer}.self_attn.{name}_proj"] = (size, 32)
        shapes[f"{layer}.mlp.gate_proj"] = shapes[f"{layer}.mlp.up_proj"] = (48, 32)
        shapes[f"{layer}.mlp.down_proj"] = (32, 48)
        shapes[f"{layer}.input_layernorm"] = shapes[f"{layer}.post_attention_layernorm"] = (32,)
    leaves = {"lm_head.weight": torch.randn(101, 32, generator=generator)}
    for name, shape in shapes.items():
        leaves[f"model.{name}.weight"] = torch.randn(shape, generator=generator) * 0.2
        if "self_attn" in name:
            leaves[f"model.{name}.bias"] = torch.randn(shape[0], generator=generator)
    return leaves


def _pangu_logits(leaves, tokens):
    """The published model in plain steps, one head and one token at a time."""

    def norm(x, name):
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return x * scale * leaves[f"model.{name}.weight"]

    def project(x, name):
        return x @ leaves[f"model.{name}.weight"].T + leaves.get(f"model.{name}.bias", 0)

    def turned(head, position):
        angles = position / 16e6 ** (torch.arange(4) / 4)
        pairs = torch.complex(head[:4], head[4:]) * torch.polar(torch.ones(4), angles)
        return torch.cat((pairs.real, pairs.imag))

    x = leaves["model.embed_tokens.weight"][tokens]
    for layer in ("layers.0", "layers.1"):
        h = norm(x, f"{layer}.input_layernorm")
        q, k, v = (project(h, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        rows = []
        for t in range(len(tokens)):
            heads = []
            for n in range(4):
                own, shared = slice(8 * n, 8 * n + 8), slice(8 * (n // 2), 8 * (n // 2) + 8)
                query = turned(q[t, own], t)
                keys = torch.stack([turned(k[s, shared], s) for s in range(t + 1)])
                heads.append((keys @ query / 8**0.5).softmax(0) @ v[: t + 1, shared])
            rows.append(torch.cat(heads))
        x = x + project(torch.stack(rows), f"{layer}.self_attn.o_proj")
        h = norm(x, f"{layer}.post_attention_layernorm")
        gate = functional.silu(project(h, f"{layer}.mlp.gate_proj"))
        x = x + project(gate * project(h, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    return norm(x, "norm") @ leaves["lm_head.weight"].T


@pytest.fixture
def pangu(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PANGU))
    leaves = _pangu_leaves()
    save_file(leaves, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path, leaves


@torch.no_grad()
def test_pangu_equals_a_plain_implementation(pangu):
    folder, leaves = pangu
    model = load_model(folder)
    tokens = torch.randint(0, 101, (15,), generator=torch.Generator().manual_seed(1))
    expected = _pangu_logits(leaves, tokens)
    assert (model.logits(model(tokens[None]))[0] - expected).abs().max() < 1e-4
    cache = model.make_cache(batch_size=1, capacity=15)
    steps = torch.cat([model(tokens[None, i : i + 1], cache=cache) for i in range(15)], dim=1)
    assert (model.logits(steps)[0] - expected).abs().max() < 1e-4


@torch.no_grad()
def test_packed_pangu_documents_equal_separate_ones(pangu):
    folder, leaves = pangu
    model = load_model(folder)
    tokens = torch.randint(0, 101, (15,), generator=torch.Generator().manual_seed(2))
    positions = torch.cat((torch.arange(6), torch.arange(9)))[None]
    segments = torch.cat((torch.zeros(6), torch.ones(9))).long()[None]
    packed = model.logits(model(tokens[None], TokenLayout(positions=positions, segments=segments)))[
        0
    ]
    expected = torch.cat([_pangu_logits(leaves, part) for part in tokens.split([6, 9])])
    assert (packed - expected).abs().max() < 1e-4


def test_pangu_import_then_export_keeps_every_byte(pangu, tmp_path):
    folder, leaves = pangu
    (tmp_path / "export").mkdir()
    write_model(load_model(folder), tmp_path / "export")
    after = load_file(tmp_path / "export" / "model.safetensors")
    assert after.keys() == leaves.keys()
    assert all(torch.equal(after[name], leaf) for name, leaf in leaves.items())
    again = json.loads((tmp_path / "export" / "config.json").read_text())
    assert {key: again[key] for key in PANGU} == PANGU


def test_an_unknown_architecture_lists_all_that_are_known(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["Gemma4ForCausalLM"]}')
    with pytest.raises(ModelError, match=r"Did you mean 'Gemma\dForCausalLM'") as error:
        load_model(tmp_path)
    assert all(name in str(error.value) for name in FAMILIES)


def _changed_config(model, folder, **changes):
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_quantized_weights_are_refused_rather_than_misread(tmp_path):
    changes = {"quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(ModelError, match="quantized weights are not read here"):
        load_model(_changed_config(make_reference("deepseek-v3"), tmp_path, **changes))


def test_dropout_is_said_to_be_left_out(tmp_path):
    folder = _changed_config(make_reference("gpt2"), tmp_path, resid_pdrop=0.1)
    with pytest.warns(UserWarning, match="training goes without resid_pdrop"):
        load_model(folder)


def test_old_gpt2_files_without_prefix_and_with_masks_are_read(tmp_path):
    theirs = make_reference("gpt2")
    theirs.save_pretrained(tmp_path)
    leaves = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): leaf for name, leaf in leaves.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    save_file(bare | masks, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens, ours = torch.arange(20)[None], load_model(tmp_path)
    with torch.no_grad():
        assert (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4


def test_layers_that_predict_further_tokens_are_left_out_aloud(tmp_path):
    theirs = make_reference("deepseek-v3")
    theirs.save_pretrained(tmp_path)
    leaves = load_file(tmp_path / "model.safetensors")
    leaves["model.layers.3.eh_proj.weight"] = torch.ones(48, 96)
    save_file(leaves, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="1 tensors of layers that predict further tokens"):
        load_model(tmp_path)


def test_long_factors_do_not_change_while_a_cache_fills(tmp_path):
    # 10 tokens alone are short; in a cache of 40 they are the begin of a long text.
    make_reference("phi3-long-partial").save_pretrained(tmp_path)
    model, tokens = load_model(tmp_path), torch.arange(40)[None]
    with torch.no_grad():
        full, alone = model(tokens), model(tokens[:, :10])
        cache = model.make_cache(batch_size=1, capacity=40)
        first = model(tokens[:, :10], cache=cache)
    torch.testing.assert_close(first, full[:, :10], atol=1e-5, rtol=0)
    assert (alone - full[:, :10]).abs().max() > 1e-3


def test_strict_numerics_are_refused_where_kernels_are_missing():
    with pytest.raises(ModelError, match="do not know this sliding_window, activation yet"):
        DecoderConfig(numerics="strict", sliding_window=5, activation="gelu")


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(ModelError, match=r"plain_layers names \[3\]; the layers are 0..2"):
        DecoderConfig(num_layers=3, plain_layers=(1, 3))


def test_every_switch_survives_the_way_through_config_json():
    for config in (
        DecoderConfig(family="mistral", num_layers=2, sliding_window=9),
        DecoderConfig(family="smollm3", num_layers=5, plain_layers=(0, 4)),
        DecoderConfig(family="qwen2", attention_bias=True, rope=Rope(kind="yarn", factor=2.0)),
    ):
        assert check_family(config).name == config.family


def test_experts_equal_a_sum_over_all_of_them():
    torch.manual_seed(0)
    settings = ExpertSettings(
        num_experts=6, experts_per_token=3, intermediate_size=11, scale=1.7, normalize=False
    )
    layer, x = ExpertFeedForward(8, settings).double(), torch.randn(2, 9, 8).double()
    scores = (x @ layer.gate.weight.T).softmax(-1)
    kth = scores.topk(3).values[..., -1:]
    weights = torch.where(scores >= kth, scores, 0.0) * 1.7
    expected = torch.zeros_like(x)
    for number in range(6):
        gate, up, down = (
            getattr(layer.experts, name)[number] for name in ("gate_proj", "up_proj", "down_proj")
        )
        inner = functional.silu(x @ gate.T) * (x @ up.T)
        expected += weights[..., number, None] * (inner @ down.T)
    # Weights are handed on in the float32 of the scores.
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_a_model_of_experts_is_captured_as_one_graph_of_reused_layers():
    config = DecoderConfig(
        family="mixtral",
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_layers=4,
        num_heads=2,
        num_kv_heads=1,
        head_size=8,
        experts=ExpertSettings(num_experts=4, experts_per_token=2, intermediate_size=24),
    )
    model, tokens = Decoder(config), torch.arange(12)[None]
    graph = plait.capture(model, tokens, loss=lambda m, t: m.loss(m(t), t))
    # The first layer, whose input has no gradient behind it, and all others.
    assert 1 <= len(graph.templates) < config.num_layers
