"""Adapters that PEFT reads from us, and that we read from PEFT."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from plait.checkpoint.huggingface import load_model, write_model
from plait.checkpoint.peft import load_adapter, write_adapter
from plait.errors import CheckpointError
from plait.nn.lora import LoraSettings, add_lora, lora_layers, merge_lora

# peft 0.21 asks transformers 5.23 by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LLAMA = LlamaConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
GPT_2 = GPT2Config(
    vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
)
GPT_2.resid_pdrop = GPT_2.embd_pdrop = GPT_2.attn_pdrop = 0.0
BASES = {"llama": lambda: LlamaForCausalLM(LLAMA), "gpt2": lambda: GPT2LMHeadModel(GPT_2)}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
OURS = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("qkv_proj", "up_proj")}
TOKENS = torch.arange(30)[None] % 101


@pytest.fixture(params=BASES)
def base(request, tmp_path):
    """Name of a base model and the folder it lies in."""
    torch.manual_seed(0)
    BASES[request.param]().save_pretrained(tmp_path / "base")
    return request.param, tmp_path / "base"


def _random(tensors):
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_(std=0.2, generator=torch.Generator().manual_seed(len(tensor)))


def _theirs(folder, name):
    kind = LlamaForCausalLM if name == "llama" else GPT2LMHeadModel
    return kind.from_pretrained(folder).eval()


@torch.no_grad()
def test_an_adapter_of_ours_computes_the_same_in_peft(base, tmp_path):
    name, folder = base
    model = load_model(folder)
    settings = LoraSettings(rank=4, alpha=10.0, targets=OURS[name])
    add_lora(model, settings)
    _random(p for n, p in model.named_parameters() if "lora_" in n)
    write_adapter(model, tmp_path / "adapter", settings=settings, base_model=str(folder))
    theirs = PeftModel.from_pretrained(_theirs(folder, name), tmp_path / "adapter")
    ours = model.logits(model(TOKENS))
    assert (ours - theirs(TOKENS).logits).abs().max() < 1e-4
    assert (ours - _theirs(folder, name)(TOKENS).logits).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("rank_stable", [False, True], ids=["by rank", "by its root"])
def test_an_adapter_of_peft_computes_the_same_here_and_merged(base, tmp_path, rank_stable):
    name, folder = base
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS[name],
        use_rslora=rank_stable,
        fan_in_fan_out=name == "gpt2",
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(_theirs(folder, name), config)
    _random(p for n, p in theirs.named_parameters() if "lora_" in n)
    theirs.eval().save_pretrained(tmp_path / "adapter")
    model = load_model(folder)
    settings = load_adapter(model, tmp_path / "adapter")
    assert (settings.rank, settings.rank_stable) == (4, rank_stable)
    expected = theirs(TOKENS).logits
    assert (model.logits(model(TOKENS)) - expected).abs().max() < 1e-4
    with pytest.raises(CheckpointError, match="the model has adapters"):
        write_model(model, tmp_path)
    merge_lora(model)
    (tmp_path / "merged").mkdir()
    write_model(model, tmp_path / "merged")
    assert (_theirs(tmp_path / "merged", name)(TOKENS).logits - expected).abs().max() < 1e-4


def test_import_then_export_of_an_adapter_keeps_every_tensor(base, tmp_path):
    name, folder = base
    model = load_model(folder)
    settings = LoraSettings(rank=4, targets=OURS[name])
    add_lora(model, settings)
    write_adapter(model, tmp_path / "first", settings=settings)
    again = load_model(folder)
    write_adapter(again_with(again, tmp_path / "first"), tmp_path / "second", settings=settings)
    first, second = (
        (tmp_path / place / "adapter_model.safetensors").read_bytes()
        for place in ("first", "second")
    )
    assert first == second


def again_with(model, folder):
    load_adapter(model, folder)
    return model


def _changed(tmp_path, **changes):
    torch.manual_seed(0)
    BASES["llama"]().save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base")
    settings = LoraSettings(rank=4, targets=("q_proj",))
    add_lora(model, settings)
    write_adapter(model, tmp_path / "adapter", settings=settings)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return load_model(tmp_path / "base"), tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "only LORA is read"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"bias": "all"}, "bias is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not"),
        ({"use_qalora": True}, "use_qalora is not supported"),
        ({"r": 8}, r"lora_A of layers.0.self_attn.q_proj is \(4, 32\), expected \(8, 32\)"),
    ],
    ids=["kind", "dora", "bias", "start", "qalora", "rank"],
)
def test_what_is_more_or_other_than_lora_is_refused(tmp_path, changes, message):
    model, adapter = _changed(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, adapter)


def test_a_quantized_base_takes_an_adapter(tmp_path):
    model, adapter = _changed(tmp_path)
    load_adapter(model, adapter, quantize=True)
    assert all(layer.quantized for _, layer in lora_layers(model))
    assert torch.isfinite(model(TOKENS)).all()
