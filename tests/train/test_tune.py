"""Fine-tuning: it learns, it resumes bit for bit, and others read what it writes."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from plait.checkpoint.huggingface import load_model, load_tokenizer
from plait.cli.main import app
from plait.errors import CheckpointError, ConfigError, DataError
from plait.nn.lora import LoraSettings
from plait.recipes.catalog import find_recipe
from plait.serve.generate import generate
from plait.serve.sampling import Sampling
from plait.train.run_folder import RunFolder
from plait.train.tune import tune
from plait.train.tuning_loss import preference_loss
from plait.train.watch import Watch

from .tiny_model import chat_rows, make_model_folder, preference_rows, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("tune") / "tiny")


@pytest.fixture
def job(folder, tmp_path):
    recipe = find_recipe("sft")
    return replace(
        recipe,
        model=str(folder),
        data=write_rows(tmp_path / "chat.jsonl", chat_rows()),
        template="plain",
        sequence_length=96,
        batch_size=4,
        micro_batch_size=2,
        num_steps=12,
        dtype="float32",
        device="cpu",
        save_every=5,
        optimizer=replace(recipe.optimizer, learning_rate=5e-3, warmup_steps=2),
        lora=LoraSettings(rank=8, alpha=16.0),
    )


def _longer(job):
    """Long enough for an adapter to bend a model of noise."""
    rate = replace(job.optimizer, learning_rate=2e-2)
    return replace(job, num_steps=40, save_every=40, optimizer=rate)


def _run(job, path, **watch):
    run = RunFolder(path)
    if not run.resolved.exists():
        run.write_job(job)
    return run, tune(job, run, Watch(**watch))


def _losses(run):
    return [record["loss"] for record in run.read_metrics() if "loss" in record]


def test_an_adapter_learns_and_peft_computes_what_the_merged_model_does(job, folder, tmp_path):
    run, result = _run(_longer(job), tmp_path / "run")
    losses = _losses(run)
    assert losses[-1] < 0.7 * losses[0]
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        ours = result.model.logits(result.model(tokens))
        base = AutoModelForCausalLM.from_pretrained(folder).eval()
        theirs = PeftModel.from_pretrained(base, run.adapter)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(run.model).eval()(tokens).logits
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - merged).abs().max() < 1e-4


def test_a_run_that_was_stopped_ends_with_the_same_bits(job, tmp_path):
    whole, _ = _run(job, tmp_path / "whole")
    calls = iter([False] * 6 + [True] * 100)
    parts, first = _run(job, tmp_path / "parts", should_stop=lambda: next(calls))
    assert not first.finished
    _, last = _run(job, tmp_path / "parts")
    assert last.finished
    assert _losses(whole) == _losses(parts)
    expected, found = (load_file(run.model / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("level", "pack", "tolerance"), [("O0", True, 0.0), ("O1", False, 1e-3)])
def test_compiled_steps_learn_what_eager_ones_do(level, pack, tolerance, job, tmp_path):
    """O0 has eager's bits whatever the lengths of rows; O1 rounds otherwise."""
    job = replace(job, pack=pack, num_steps=6)
    eager, compiled = (
        _losses(_run(replace(job, level=each), tmp_path / each)[0]) for each in ("eager", level)
    )
    assert compiled == pytest.approx(eager, rel=tolerance, abs=0)


def test_full_fine_tuning_memorizes_a_few_answers(job, tmp_path):
    rate = replace(job.optimizer, learning_rate=1e-2)
    job = replace(job, method="full", num_steps=60, optimizer=rate)
    run, result = _run(job, tmp_path / "run")
    assert not run.adapter.exists()
    tokenizer = load_tokenizer(run.model)
    prompt = tokenizer.encode("### user\nwhat colour is grass?\n### assistant\n").ids
    answer = generate(
        result.model, prompt, Sampling(temperature=0, max_new_tokens=20), stop_tokens=[0]
    )
    assert tokenizer.decode(list(answer)) == "it is green."


def test_a_four_bit_base_learns(job, tmp_path):
    run, result = _run(
        _longer(replace(job, lora=replace(job.lora, quantize=True))), tmp_path / "run"
    )
    losses = _losses(run)
    assert losses[-1] < 0.7 * losses[0]
    assert torch.isfinite(result.model(torch.arange(9)[None])).all()


def test_unpacked_rows_are_the_same_samples(job, tmp_path):
    packed, _ = _run(replace(job, num_steps=1), tmp_path / "packed")
    apart, _ = _run(replace(job, num_steps=1, pack=False), tmp_path / "apart")
    facts = [json.loads(run.data.read_text())["train"] for run in (packed, apart)]
    assert facts[0]["num_rows"] < facts[1]["num_rows"] == facts[1]["num_samples"] == 10
    assert facts[0]["num_counted"] == facts[1]["num_counted"]
    assert list(facts[0]["files"]) == [job.data]


def test_the_best_checkpoint_is_what_is_exported(job, tmp_path):
    # One of two sets is learnt by heart; the other one, of noise, gets worse from the start.
    noise = [{"prompt": "zz", "completion": f"{i} q{7 * i}x"} for i in range(4)]
    worse = write_rows(tmp_path / "worse.jsonl", noise)
    again = write_rows(tmp_path / "again.jsonl", chat_rows())
    job = replace(job, evaluation_data=(again, worse), evaluate_every=4, num_steps=8)
    run, _ = _run(job, tmp_path / "run")
    scores = [r for r in run.read_metrics() if "heldout_loss" in r]
    assert [r["step"] for r in scores] == [0, 4, 8]
    assert all(r["heldout_loss"] == r["heldout_loss/again"] for r in scores)
    assert "heldout_loss/worse" in scores[0]
    best = min(scores, key=lambda r: r["heldout_loss"])
    state = json.loads((run.checkpoints / "best" / "training_state.json").read_text())
    assert state["step"] == best["step"]


def test_preferences_are_learnt(job, tmp_path):
    data = write_rows(tmp_path / "pairs.jsonl", preference_rows())
    job = replace(job, name="dpo", objective="dpo", pack=False, data=data, evaluation_data=(data,))
    job = replace(_longer(job), beta=1.0, evaluate_every=20)
    run, _ = _run(job, tmp_path / "run")
    losses = _losses(run)
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-3)
    assert losses[-1] < 0.3
    last = [r for r in run.read_metrics() if "heldout_won/pairs" in r][-1]
    assert last["heldout_won/pairs"] == 1.0


def test_the_loss_of_preferences_is_its_formula():
    logps, reference = (
        torch.tensor([-3.0, -5.0, -2.0, -1.0]),
        torch.tensor([-4.0, -4.0, -2.0, -2.0]),
    )
    loss, won = preference_loss(logps, reference, beta=0.5)
    margins = torch.tensor([0.5 * (1.0 - -1.0), 0.5 * (0.0 - 1.0)])
    torch.testing.assert_close(loss, (1 + (-margins).exp()).log().sum())
    assert won == 1


def test_rows_that_cannot_be_used_stop_the_run_or_are_counted(job, tmp_path):
    rows = [*chat_rows(), {"prompt": "x"}]
    job = replace(job, data=write_rows(tmp_path / "bad.jsonl", rows), num_steps=1)
    with pytest.raises(DataError, match=r"bad.jsonl:11: needs 'messages'"):
        _run(job, tmp_path / "error")
    run, _ = _run(replace(job, on_bad_row="skip"), tmp_path / "skip")
    facts = json.loads(run.data.read_text())["train"]
    assert (facts["left_out"], facts["num_samples"]) == (1, 10)
    assert "bad.jsonl:11" in facts["left_out_rows"][0]


def test_settings_that_cannot_work_are_refused(job, tmp_path):
    with pytest.raises(ConfigError, match=r"sft needs model and data: give --set model="):
        find_recipe("sft").check_ready()
    with pytest.raises(ConfigError, match="four-bit weights do not learn"):
        replace(job, method="full", lora=LoraSettings(quantize=True))
    with pytest.raises(ConfigError, match="more than the 128 positions"):
        _run(replace(job, sequence_length=200), tmp_path / "long")


def test_a_run_can_be_fine_tuned_further(job, tmp_path):
    first, _ = _run(replace(job, num_steps=2), tmp_path / "first")
    again = replace(job, model=str(first.path), template="", num_steps=2)
    second, _ = _run(again, tmp_path / "second")
    assert load_model(second.model).config == load_model(first.model).config


def test_an_adapter_of_peft_learns_on(job, folder, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    theirs.save_pretrained(tmp_path / "theirs")
    job = replace(job, lora=LoraSettings(), adapter=str(tmp_path / "theirs"), num_steps=2)
    run, _ = _run(job, tmp_path / "run")
    before, after = (
        load_file(path / "adapter_model.safetensors") for path in (tmp_path / "theirs", run.adapter)
    )
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    # Two steps of the small rate of the warm-up lead nowhere far from where they began.
    assert all((before[name] - after[name]).abs().max() < 0.02 for name in before)
    # From a run, the adapter is the one in its folder; its base is as it was before it was merged.
    again, _ = _run(replace(job, adapter=str(run.path)), tmp_path / "again")
    assert again.adapter.is_dir()


def test_settings_beside_an_adapter_are_refused(job, tmp_path):
    with pytest.raises(ConfigError, match="brings its own rank"):
        replace(job, adapter="x")
    with pytest.raises(ConfigError, match="adapter needs method=lora"):
        replace(job, adapter="x", method="full")
    with pytest.raises(ConfigError, match="adapter=nowhere is not a folder"):
        replace(job, adapter="nowhere", lora=LoraSettings()).check_ready()


def test_the_run_says_which_weights_it_began_with(job, folder, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    calls = iter([False, True])
    job = replace(job, model=str(own))
    run, first = _run(job, tmp_path / "run", should_stop=lambda: next(calls))
    assert not first.finished
    weights = own / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads(run.base_model.read_text())[str(weights)] == digest
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not what .* began with"):
        _run(job, tmp_path / "run")


def test_a_merged_adapter_computes_what_peft_computes(job, folder, tmp_path):
    run, _ = _run(replace(job, num_steps=2), tmp_path / "run")
    words = ["merge", str(folder), str(run.path), "--out", str(tmp_path / "merged")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "rank 8, alpha 16" in result.output
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder).eval()
        theirs = PeftModel.from_pretrained(base, run.adapter)(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(tokens).logits
    assert (merged - theirs).abs().max() < 1e-4
    vocabularies = [load_tokenizer(each).get_vocab() for each in (folder, tmp_path / "merged")]
    assert vocabularies[0] == vocabularies[1]
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, ConfigError)


BAD_ROWS = {
    "no json": ('{"messages": [', "no JSON"),
    "missing field": ('{"prompt": "x"}', "needs 'messages'"),
    "wrong role": ('{"messages": [{"role": "user", "content": "hi"}]}', "nothing to learn"),
    "oversized": (json.dumps({"prompt": "sky " * 300, "completion": "x"}), "more than the 97"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_every_kind_of_bad_row_is_named_or_counted(job, tmp_path, line, reason):
    rows = "".join(json.dumps(row) + "\n" for row in chat_rows())
    (tmp_path / "bad.jsonl").write_text(f"{rows}{line}\n{rows}")
    job = replace(job, data=str(tmp_path / "bad.jsonl"), num_steps=1)
    with pytest.raises(DataError, match=rf"bad\.jsonl:11: .*{reason}.*on_bad_row=skip"):
        _run(job, tmp_path / "error")
    told = []
    job = replace(job, on_bad_row="skip", num_workers=1 if reason == "no JSON" else 0)
    run, _ = _run(job, tmp_path / "skip", on_stage=told.append)
    facts = json.loads(run.data.read_text())["train"]
    assert (facts["left_out"], facts["num_samples"]) == (1, 20)
    (named,) = facts["left_out_rows"]
    assert "bad.jsonl:11: " in named
    assert reason in named
    assert any("1 rows of" in text and "bad.jsonl:11" in text for text in told)


def test_fields_that_are_not_read_are_said_and_counted(job, tmp_path):
    rows = [{**row, "source": "here", "name": None} for row in chat_rows()]
    rows[0]["prompt"] = "beside messages this is not read either"
    told = []
    job = replace(job, data=write_rows(tmp_path / "more.jsonl", rows), num_steps=1)
    run, _ = _run(job, tmp_path / "run", on_stage=told.append)
    facts = json.loads(run.data.read_text())["train"]
    assert facts["unread_fields"] == {"source": 10, "name": 10, "prompt": 1}
    assert any("fields that are not read: source, name, prompt" in text for text in told)


def test_a_template_that_does_not_fit_names_the_row(job, tmp_path):
    (tmp_path / "strict.jinja").write_text(
        "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
        "{{ raise_exception('only user and assistant') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    turns = [{"role": "system", "content": "be kind"}, {"role": "assistant", "content": "yes"}]
    rows = [*chat_rows(), {"messages": turns}]
    job = replace(job, data=write_rows(tmp_path / "rows.jsonl", rows))
    job = replace(job, template=str(tmp_path / "strict.jinja"))
    with pytest.raises(DataError, match=r"rows\.jsonl:11: .*only user and assistant"):
        _run(job, tmp_path / "run")


def _command(folder, data, *more):
    settings = {
        "model": folder,
        "data": data,
        "template": "plain",
        "sequence_length": 96,
        "batch_size": 4,
        "micro_batch_size": 4,
        "num_steps": 3,
        "device": "cpu",
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return CliRunner().invoke(app, ["train", "sft", *words, *more])


def test_the_command_fine_tunes_and_says_what_came_out(folder, tmp_path):
    data = write_rows(tmp_path / "chat.jsonl", chat_rows())
    result = _command(folder, data, "--out", str(tmp_path / "run"), "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["step"] == 3
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert "<polyline" in (tmp_path / "run" / "report.html").read_text()
    resumed = CliRunner().invoke(app, ["train", "sft", "--resume", str(tmp_path / "run"), "--json"])
    assert json.loads(resumed.stdout)["loss"] == facts["loss"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lora.rnak=4", "Did you mean 'rank'"),
        ("templat=plain", "Did you mean 'template'"),
        ("model=", "sft needs model"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(folder, tmp_path, setting, message):
    data = write_rows(tmp_path / "chat.jsonl", chat_rows())
    result = _command(folder, data, "--set", setting, "--out", str(tmp_path / "run"))
    assert message in str(result.exception)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data=none.jsonl", "none.jsonl does not exist"),
        ("sequence_length=999", "more than the 128 positions"),
        ("template=none.jinja", "neither 'plain' nor a file"),
        ("model=.", "has no config.json"),
    ],
)
def test_a_run_that_could_not_begin_leaves_nothing_behind(folder, tmp_path, setting, message):
    data = write_rows(tmp_path / "chat.jsonl", chat_rows())
    result = _command(folder, data, "--set", setting, "--out", str(tmp_path / "run"))
    assert message in str(result.exception)
    assert not (tmp_path / "run").exists()
    again = _command(folder, data, "--out", str(tmp_path / "run"))
    assert again.exit_code == 0, again.output
