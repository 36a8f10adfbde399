"""The command line as a user meets it: real processes, real folders, real signals."""

import fcntl
import hashlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from plait import load_model
from tests.forked_process import run_plait as plait

pytestmark = pytest.mark.slow
PLAIT = [sys.executable, "-m", "plait.cli.main"]
_LIMIT_BYTES = 40_000
DOCS = Path(__file__).parents[2] / "docs"
TINY = [
    "model.vocab_size=320",
    "model.hidden_size=48",
    "model.intermediate_size=48",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.num_kv_heads=1",
    "model.head_size=16",
    "model.max_positions=64",
    "sequence_length=32",
    "batch_size=4",
    "micro_batch_size=2",
    "num_steps=12",
    "save_every=4",
    "optimizer.warmup_steps=2",
    "evaluation.every=6",
    "evaluation.samples=4",
    "evaluation.stride=16",
    "corpus.heldout_fraction=0.2",
]


def tiny(folder, *more, **changes):
    """Arguments of a small job on the texts in a folder."""
    settings = dict(item.split("=") for item in TINY) | {"data": folder} | changes
    return [*more, *(word for k, v in settings.items() for word in ("--set", f"{k}={v}"))]


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        lines = [
            f"the value {j * i} of file {i} is {'odd' if j % 2 else 'even'}\n" for j in range(60)
        ]
        (folder / f"{i:02}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    """A run that went through in one piece, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    result = plait("train", "stdlib_demo", *tiny(texts, "--out", "run", "--json"), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "run", json.loads(result.stdout)


def test_a_run_measures_itself(finished):
    run, result = finished
    assert result["step"] == 12
    assert 0 < result["bits_per_byte"] < 10
    assert result["perplexity"] == pytest.approx(
        math.exp(result["bits_per_byte"] * math.log(2) * result["num_bytes"] / result["num_tokens"])
    )
    assert set(result["xz"]) == {"solid", "per_file", "conditional"}
    assert result["sample"].startswith("class Stack:\n    def __init__(self")
    assert losses(run).keys() == set(range(1, 13))


def test_the_run_folder_says_everything_about_the_run(finished, texts):
    run, _ = finished
    resolved = json.loads((run / "resolved.json").read_text())
    assert resolved["optimizer"]["warmup_steps"] == 2
    assert resolved["data"] == str(texts)
    corpus = json.loads((run / "corpus.json").read_text())
    names = [document["name"] for side in ("train", "heldout") for document in corpus[side]]
    assert sorted(names) == [f"{i:02}.txt" for i in range(12)]
    assert re.fullmatch("[0-9a-f]{64}", corpus["sha256"])
    html = (run / "report.html").read_text()
    assert "<polyline" in html
    assert "bits per byte" in html


def test_transformers_loads_the_model_and_scores_the_same(finished):
    run, _ = finished
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    text = "the value 12 of file 3 is even\n"
    tokens = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(tokens[0]) == text
    ours = load_model(run / "model")
    with torch.no_grad():
        difference = (ours.logits(ours(tokens)) - model(tokens).logits).abs().max()
    assert difference < 1e-4
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0


def test_a_stopped_run_resumes_bit_for_bit(finished, texts, tmp_path):
    command = [*PLAIT, "train", "stdlib_demo", *tiny(texts, "--out", "run")]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 5 "):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130
    assert "plait train stdlib_demo --resume run" in rest
    stopped_at = max(losses(tmp_path / "run"))
    assert 5 <= stopped_at < 12
    result = plait("train", "stdlib_demo", "--resume", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run, _ = finished
    assert losses(tmp_path / "run") == losses(run)
    ours, theirs = (load_file(r / "model/model.safetensors") for r in (tmp_path / "run", run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_killed_run_resumes_from_its_last_checkpoint_bit_for_bit(finished, texts, tmp_path):
    command = [*PLAIT, "train", "stdlib_demo", *tiny(texts, "--out", "run")]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("step 10 "):
                process.kill()
                break
    result = plait("train", "stdlib_demo", "--resume", "run", cwd=tmp_path)
    assert "resuming from step-000008" in result.stderr
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == losses(finished[0])


def test_accumulation_gives_the_same_losses_up_to_rounding(finished, texts, tmp_path):
    changes = {"micro_batch_size": 4}
    result = plait("train", "stdlib_demo", *tiny(texts, "--out", "run", **changes), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    whole, parts = losses(tmp_path / "run"), losses(finished[0])
    # Products in bfloat16, summed in another order: 2^-8 of a loss of about 5.
    assert all(abs(whole[step] - parts[step]) < 0.02 for step in parts)


def test_evaluate_repeats_the_numbers_of_the_run(finished):
    run, result = finished
    again = plait("evaluate", run, "--json", cwd=run.parent)
    assert json.loads(again.stdout)["bits_per_byte"] == result["bits_per_byte"]
    table = plait("evaluate", run, cwd=run.parent).stdout
    assert "xz -9e, all in one" in table


def test_evaluate_scores_any_folder_with_a_model_folder(finished, texts):
    run, _ = finished
    result = plait("evaluate", run / "model", "--data", texts, "--json", cwd=run.parent)
    scores = json.loads(result.stdout)
    assert scores["num_bytes"] == sum(path.stat().st_size for path in texts.iterdir())
    assert scores["xz"]["conditional"] is None


def test_sample_completes_a_prompt_and_repeats_itself(finished):
    run, _ = finished
    arguments = ["sample", run, "--prompt", "the value", "--set", "max_new_tokens=20"]
    first, second = (plait(*arguments, cwd=run.parent) for _ in range(2))
    assert first.stdout.startswith("the value")
    assert first.stdout == second.stdout
    as_json = json.loads(plait(*arguments, "--json", cwd=run.parent).stdout)
    assert as_json["text"] + "\n" == first.stdout


def test_chat_answers_each_line_and_ends_at_end_of_file(finished):
    run, _ = finished
    result = plait(
        "chat", run, "--set", "max_new_tokens=5", cwd=run.parent, input="the value\nfile"
    )
    assert result.returncode == 0
    assert result.stdout.count("> ") == 3
    assert "no chat template" in result.stderr


def test_doctor_names_features_kernels_and_extras(tmp_path):
    sections = json.loads(plait("doctor", "--json", cwd=tmp_path).stdout)
    assert {"cpu", "gpu", "torch", "amx_bf16", "avx512_bf16"} <= sections["machine"].keys()
    assert sections["machine"]["torch"].startswith(torch.__version__)
    assert "causal attention, bfloat16" in sections["kernels"]
    assert sections["extras"]["test"].startswith("installed")


def _refused(result, *words):
    """One clean line on stderr, behind whatever was going on, and exit code 1."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(r"\w+Error: ", last), result.stderr
    assert all(word in last for word in words), last


BAD_JOBS = {
    "unknown recipe": (["train", "stdlib_16m"], ["Did you mean 'stdlib_15m'"]),
    "unknown key": (["train", "stdlib_demo", "--set", "num_step=3"], ["Did you mean 'num_steps'"]),
    "wrong type": (["train", "stdlib_demo", "--set", "num_steps=x"], ["not a whole number"]),
    "missing folder": (["train", "stdlib_demo", "--set", "data=nowhere"], ["does not exist"]),
    "sequence too long": (
        ["train", "stdlib_demo", "--set", "sequence_length=4096"],
        ["4096", "model.max_positions=1024"],
    ),
    "a name of its own": (["train", "stdlib_demo", "--set", "name=x"], ["that of its recipe"]),
    "empty data": (["train", "stdlib_demo", "--set", "data="], ["data is empty"]),
    "unknown family": (
        ["train", "stdlib_demo", "--set", "model.family=lama"],
        ["Did you mean 'llama'", "Known: ", "qwen3"],
    ),
    "not a number": (
        ["train", "stdlib_demo", "--set", "optimizer.learning_rate=nan"],
        ["not a finite number"],
    ),
    "long prompt": (
        ["train", "stdlib_demo", "--set", "data=DOCS", "--set", f"prompt={'word ' * 2000}"],
        ["fewer than model.max_positions"],
    ),
    "no room for the start": (
        ["train", "stdlib_demo", "--set", "model.num_layers=1"],
        ["num_layers must be at least 2", "initialization=random"],
    ),
    "no run to resume": (["train", "stdlib_demo", "--resume", "nowhere"], ["not a run folder"]),
    "no model": (["evaluate", "nowhere", "--data", "."], ["has no config.json"]),
    "bad sampling": (["sample", ".", "--set", "top_p=7"], ["0 < top_p <= 1"]),
}


@pytest.mark.parametrize("name", BAD_JOBS)
def test_bad_input_ends_in_one_clean_line(name, tmp_path):
    arguments, words = BAD_JOBS[name]
    arguments = [word.replace("DOCS", str(DOCS)) for word in arguments]
    _refused(plait(*arguments, cwd=tmp_path), *words)


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    _refused(plait("train", "stdlib_demo", *tiny("empty"), cwd=tmp_path), "has no files")


def test_a_binary_file_is_refused_by_name(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "picture.txt").write_bytes(bytes(range(256)))
    result = plait("train", "stdlib_demo", *tiny("texts"), cwd=tmp_path)
    _refused(result, "picture.txt is not text")


def test_a_corpus_smaller_than_a_sample_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a b c\nd e f\n" * 4)
    _refused(plait("train", "stdlib_demo", *tiny("texts"), cwd=tmp_path), "do not fill one sample")


def test_a_prompt_longer_than_the_model_is_refused(finished):
    run, _ = finished
    result = plait("sample", run, "--prompt", "the value " * 100, cwd=run.parent)
    _refused(result, "the model's limit is 64")


def _copy(run, folder):
    subprocess.run(["cp", "-r", run, folder], check=True)
    return folder


def test_a_checkpoint_cut_in_half_is_refused(finished, tmp_path):
    run = _copy(finished[0], tmp_path / "run")
    (path,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    result = plait("train", "stdlib_demo", "--resume", run, cwd=tmp_path)
    _refused(result, "model.safetensors has", "cut short")


def test_a_changed_byte_in_a_checkpoint_is_noticed(finished, tmp_path):
    run = _copy(finished[0], tmp_path / "run")
    (path,) = sorted((run / "checkpoints").glob("step-*"))[-1:]
    state = path / "training_state.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    result = plait("train", "stdlib_demo", "--resume", run, cwd=tmp_path)
    _refused(result, "does not hold the bytes that were saved")


def test_two_processes_cannot_train_in_one_folder(finished, texts, tmp_path):
    run = _copy(finished[0], tmp_path / "run")
    with (run / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = plait("train", "stdlib_demo", "--resume", run, cwd=tmp_path)
    _refused(result, "another process is training")


def test_a_folder_with_other_files_is_not_taken_for_a_run(texts, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    result = plait("train", "stdlib_demo", *tiny(texts, "--out", "mine"), cwd=tmp_path)
    _refused(result, "mine is not empty")


def test_a_folder_that_cannot_be_written_ends_in_one_clean_line(texts, tmp_path):
    (tmp_path / "file").write_text("")
    result = plait("train", "stdlib_demo", *tiny(texts, "--out", "file/run"), cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("NotADirectoryError: ")


def test_an_interrupt_before_the_first_step_says_how_to_go_on(texts, tmp_path):
    command = [*PLAIT, "train", "stdlib_demo", *tiny(texts, "--out", "run")]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("reading"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read()
    assert process.returncode == 130, rest
    assert "plait train stdlib_demo --resume run" in rest
    assert "Traceback" not in rest


def test_a_run_is_not_overwritten_and_keeps_its_settings(finished, texts):
    run, _ = finished
    _refused(plait("train", "stdlib_demo", *tiny(texts, "--out", run), cwd=run.parent), "--resume")
    changed = plait("train", "stdlib_demo", "--resume", run, "--set", "seed=1", cwd=run.parent)
    _refused(changed, "its own settings")
    _refused(plait("train", "stdlib_15m", "--resume", run, cwd=run.parent), "not of stdlib_15m")


def test_a_resolved_json_with_an_unknown_key_is_refused(finished, tmp_path):
    run = _copy(finished[0], tmp_path / "run")
    path = run / "resolved.json"
    path.write_text(path.read_text().replace('"num_steps"', '"num_step"'))
    _refused(
        plait("train", "stdlib_demo", "--resume", run, cwd=tmp_path), "Did you mean 'num_steps'"
    )


def test_a_full_disk_leaves_the_previous_checkpoint_whole(texts, tmp_path):
    """The kernel refuses files beyond a size, as a full disk would, from the second save on."""
    first = plait("train", "stdlib_demo", *tiny(texts, "--out", "run"), cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "run"
    last = sorted((run / "checkpoints").glob("step-*"))[-1]
    subprocess.run(["rm", "-r", last, run / "model"], check=True)
    before = {path.name: path.read_bytes() for path in (run / "checkpoints/step-000008").iterdir()}
    assert len(before["model.safetensors"]) > _LIMIT_BYTES
    result = plait(
        "train",
        "stdlib_demo",
        "--resume",
        run,
        cwd=tmp_path,
        before=_limit_files,
    )
    _refused(result, "could not be saved", "untouched")
    after = {path.name: path.read_bytes() for path in (run / "checkpoints/step-000008").iterdir()}
    assert before == after
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000008"]
    again = plait("train", "stdlib_demo", "--resume", run, cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def _limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LIMIT_BYTES, _LIMIT_BYTES))


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_the_step(texts, tmp_path):
    start = tiny(texts, "--out", "run", num_steps=8)
    assert plait("train", "stdlib_demo", *start, cwd=tmp_path).returncode == 0
    run = tmp_path / "run"
    (checkpoint,) = sorted((run / "checkpoints").glob("step-*"))[:1]
    for path in sorted((run / "checkpoints").glob("step-*"))[1:]:
        subprocess.run(["rm", "-r", path], check=True)
    _poison(checkpoint)
    result = plait("train", "stdlib_demo", "--resume", run, cwd=tmp_path)
    _refused(result, "the loss of step 5 is not finite", "not-finite-step-000005")
    saved = load_file(run / "not-finite-step-000005" / "training_state.safetensors")
    assert saved["batch.inputs"].shape == (4, 32)
    facts = json.loads((run / "not-finite-step-000005" / "training_state.json").read_text())
    assert facts["loss"] == "nan"


def _poison(checkpoint):
    """Put a NaN into a checkpoint's weights and make its manifest agree."""
    path = checkpoint / "model.safetensors"
    leaves = load_file(path)
    next(iter(leaves.values())).view(-1)[0] = float("nan")
    leaves["model.norm.weight"][:] = float("nan")
    save_file(leaves, path, metadata={"format": "pt"})
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_help_shows_an_example_for_every_verb(tmp_path):
    for verb in ("train", "evaluate", "sample", "chat", "doctor"):
        assert "Example: plait" in plait(verb, "--help", cwd=tmp_path).stdout


def test_output_cut_off_by_the_reader_is_no_error(finished):
    run, _ = finished
    command = [*PLAIT, "evaluate", str(run), "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_a_bare_environment_is_enough(finished, tmp_path):
    run, _ = finished
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C"}
    command = [*PLAIT, "sample", run, "--set", "max_new_tokens=3"]
    result = subprocess.run(
        command, cwd=run.parent, env=bare, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
