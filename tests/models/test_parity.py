"""Our models against transformers: random tiny configs, the same weights, the same numbers."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from plait.checkpoint.huggingface import load_model, write_model
from plait.errors import CheckpointError, ModelError
from plait.models.decoder import DecoderConfig
from plait.models.registry import FAMILIES, check_family
from plait.nn.token_layout import TokenLayout

from .tiny_families import CONFIGS, SMALL, make_reference


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Transformers models with random weights by name, and the folders they were saved to."""
    made = {}

    def make(name):
        if name not in made:
            model, folder = make_reference(name), tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return make


@pytest.fixture(params=CONFIGS)
def reference(request, saved):
    """A model of each kind and its folder, which is not to be changed."""
    return saved(request.param)


@pytest.fixture
def llama(saved, tmp_path):
    """A Llama, and a folder of its own."""
    model, _ = saved("llama3-grouped")
    model.save_pretrained(tmp_path / "llama")
    return model, tmp_path / "llama"


@pytest.fixture
def tokens():
    return torch.randint(
        0, SMALL["vocab_size"], (2, 50), generator=torch.Generator().manual_seed(1)
    )


@torch.no_grad()
def test_logits_equal_those_of_transformers(reference, tokens):
    theirs, folder = reference
    ours = load_model(folder)
    difference = (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max()
    assert difference < 1e-4


def test_import_then_export_keeps_every_byte(reference, tmp_path):
    _, folder = reference
    (tmp_path / "export").mkdir()
    write_model(load_model(folder), tmp_path / "export")
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype
        assert before[name].numpy().tobytes() == after[name].numpy().tobytes(), name


@torch.no_grad()
def test_transformers_loads_our_export_and_computes_the_same(reference, tokens, tmp_path):
    theirs, folder = reference
    (tmp_path / "export").mkdir()
    write_model(load_model(folder), tmp_path / "export")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export").eval()
    assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_half_precision_weights_survive_import_and_export(reference, tmp_path):
    theirs, _ = reference
    copy.deepcopy(theirs).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    (tmp_path / "export").mkdir()
    write_model(load_model(tmp_path / "half"), tmp_path / "export")
    before = load_file(tmp_path / "half" / "model.safetensors")
    after = load_file(tmp_path / "export" / "model.safetensors")
    assert all(after[name].dtype == before[name].dtype for name in after)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "export" / "config.json").read_text())["dtype"] == "bfloat16"


@torch.no_grad()
def test_decoding_token_by_token_equals_the_full_forward(reference, tokens):
    # The same products in another order: a matrix product of one row sums differently from one of
    # many. Float32 rounding over three layers stays far below 1e-4 at these sizes.
    model = load_model(reference[1])
    full = model(tokens)
    cache = model.make_cache(batch_size=2, capacity=50)
    steps = torch.cat([model(tokens[:, i : i + 1], cache=cache) for i in range(50)], dim=1)
    torch.testing.assert_close(steps, full, atol=1e-4, rtol=0)


@torch.no_grad()
def test_prefill_in_chunks_equals_the_full_forward(reference, tokens):
    model = load_model(reference[1])
    cache = model.make_cache(batch_size=2, capacity=50)
    chunks = torch.cat(
        [model(part, cache=cache) for part in tokens.split([20, 7, 23], dim=1)], dim=1
    )
    torch.testing.assert_close(chunks, model(tokens), atol=1e-4, rtol=0)


@torch.no_grad()
def test_packed_documents_equal_separate_ones(reference, tokens):
    model = load_model(reference[1])
    positions = torch.cat((torch.arange(20), torch.arange(30)))[None].expand(2, -1)
    segments = torch.cat((torch.zeros(20), torch.ones(30)))[None].expand(2, -1)
    packed = model(tokens, TokenLayout(positions=positions, segments=segments))
    separate = torch.cat((model(tokens[:, :20]), model(tokens[:, 20:])), dim=1)
    torch.testing.assert_close(packed, separate, atol=1e-4, rtol=0)


def test_more_tokens_than_the_model_has_positions_are_refused(llama):
    model = load_model(llama[1])
    with pytest.raises(ModelError, match="65 tokens are more than the model's limit of 64"):
        model(torch.zeros(1, 65, dtype=torch.long))


def test_a_full_cache_is_refused(llama, tokens):
    model = load_model(llama[1])
    cache = model.make_cache(batch_size=2, capacity=10)
    with pytest.raises(ModelError, match="11 tokens do not fit into a cache of 10"):
        model(tokens[:, :11], cache=cache)


def _edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_an_unknown_architecture_offers_the_nearest(llama):
    _edit_config(llama[1], architectures=["LlamaForCausalLMs"])
    with pytest.raises(ModelError, match="Did you mean 'LlamaForCausalLM'"):
        load_model(llama[1])


def test_a_misspelt_config_key_offers_the_nearest(llama):
    _edit_config(llama[1], num_hidden_layer=2)
    with pytest.raises(ModelError, match=r"'num_hidden_layer'\. Did you mean 'num_hidden_layers'"):
        load_model(llama[1])


def test_a_strange_config_key_is_named_in_a_warning(llama):
    _edit_config(llama[1], zzz=1)
    with pytest.warns(UserWarning, match="without effect: zzz"):
        load_model(llama[1])


def test_somebodys_own_config_key_that_only_resembles_one_is_no_error(llama):
    _edit_config(llama[1], rope_interleaved=False)
    with pytest.warns(UserWarning, match="without effect: rope_interleaved"):
        load_model(llama[1])


def test_every_family_has_its_place_here():
    kinds = (MODEL_FOR_CAUSAL_LM_MAPPING[type(make())] for make in CONFIGS.values())
    tested = {kind.__name__ for kind in kinds}
    assert tested == {name for name, family in FAMILIES.items() if family.is_in_transformers}


def test_a_config_that_its_family_cannot_express_is_refused():
    config = DecoderConfig(family="llama", qk_norm=True)
    with pytest.raises(ModelError, match="a llama model cannot have this qk_norm"):
        check_family(config)
    with pytest.raises(ModelError, match="Did you mean 'llama'"):
        check_family(DecoderConfig(family="lama"))


def test_the_rotation_tables_of_old_llama_checkpoints_are_left_out(llama, tokens):
    theirs, folder = llama
    leaves = load_file(folder / "model.safetensors")
    leaves["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(leaves, folder / "model.safetensors", metadata={"format": "pt"})
    ours = load_model(str(folder))
    with torch.no_grad():
        assert (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max() < 1e-4


def test_an_unsupported_rope_type_is_refused(llama):
    _edit_config(llama[1], rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4})
    with pytest.raises(ModelError, match="rope type 'dynamic' is not supported"):
        load_model(llama[1])


def test_weights_cut_in_half_are_refused(llama):
    path = llama[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(llama[1])


def test_weights_that_do_not_fit_the_config_are_refused(llama):
    _edit_config(llama[1], num_hidden_layers=4)
    with pytest.raises(CheckpointError, match="missing"):
        load_model(llama[1])


def test_sharded_weights_are_read(llama, tokens, tmp_path):
    theirs, _ = llama
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ours = load_model(tmp_path / "shards")
    with torch.no_grad():
        difference = (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max()
    assert difference < 1e-4
