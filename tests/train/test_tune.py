"""Fine-tuning: it learns, it resumes bit for bit, and others read what it writes."""

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from plait.checkpoint.huggingface import load_model, load_tokenizer
from plait.cli.main import app
from plait.errors import ConfigError, DataError
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
