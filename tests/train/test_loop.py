"""Pre-training: rows, documents kept apart, further evaluation sets, the best, records."""

import builtins
import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from plait.checkpoint.huggingface import load_model
from plait.cli.main import app
from plait.config import override
from plait.errors import DataError, MissingExtraError
from plait.models.decoder import Decoder, DecoderConfig
from plait.nn.experts import ExpertSettings
from plait.recipes.catalog import find_recipe
from plait.train.evaluate import Scoring, evaluate
from plait.train.loop import train
from plait.train.optimizer import OptimizerSettings
from plait.train.packing import layout_of_stream
from plait.train.prepare import tokens_of
from plait.train.run_folder import RunFolder
from plait.train.utilization import (
    num_matrix_weights,
    peak_of,
    training_flops_per_token,
    utilization_on,
)
from plait.train.watch import Watch

from .tiny_model import write_rows

TINY = [
    "model.vocab_size=300",
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
    "num_steps=6",
    "save_every=3",
    "optimizer.warmup_steps=2",
    "evaluation.every=3",
    "evaluation.samples=4",
    "evaluation.stride=16",
    "corpus.heldout_fraction=0.2",
    "initialization=random",
    "dtype=float32",
    "device=cpu",
]
TEXTS = [
    {"text": f"the value {i} is {'odd' if i % 2 else 'even'}, {i * i} is its square.\n" * 3}
    for i in range(80)
]


@pytest.fixture
def job(tmp_path):
    data = write_rows(tmp_path / "texts.jsonl", TEXTS)
    return override(find_recipe("stdlib_demo"), [*TINY, f"data={data}"])


def _run(job, path, **watch):
    run = RunFolder(path)
    run.write_job(job)
    train(job, run, Watch(**watch))
    return run


def test_rows_of_text_are_trained_on_and_every_byte_is_counted(job, tmp_path):
    run = _run(job, tmp_path / "run")
    corpus = run.read_corpus()
    total = sum(len(row["text"].encode()) for row in TEXTS)
    assert sum(corpus["num_bytes"].values()) == total
    assert 0.05 < corpus["num_bytes"]["heldout"] / total < 0.4
    assert list(corpus["files"]) == [job.data]
    assert run.model.is_dir()


def test_a_row_without_text_is_named_or_counted(job, tmp_path):
    data = write_rows(tmp_path / "bad.jsonl", [*TEXTS, {"txt": "x"}])
    with pytest.raises(DataError, match=r"bad.jsonl:81: has no field 'text'"):
        _run(replace(job, data=data), tmp_path / "error")
    run = _run(replace(job, data=data, on_bad_row="skip"), tmp_path / "skip")
    assert run.read_corpus()["left_out"] == 1


def test_further_sets_are_scored_and_the_best_checkpoint_is_kept(job, tmp_path):
    more = tmp_path / "other.txt"
    more.write_text("something else entirely, again and again\n" * 40)
    evaluation = replace(job.evaluation, more=(str(more),))
    run = _run(replace(job, evaluation=evaluation, keep_best=True), tmp_path / "run")
    scores = [record for record in run.read_metrics() if "heldout_loss" in record]
    assert [record["step"] for record in scores] == [3, 6]
    assert all(record["heldout_bits_per_byte/other"] > 0 for record in scores)
    best = min(scores, key=lambda record: record["heldout_loss"])
    facts = json.loads((run.best / "training_state.json").read_text())
    assert (facts["step"], facts["best"]) == (best["step"], best["heldout_loss"])


def test_further_sets_may_be_rows_and_their_bad_ones_are_named(job, tmp_path):
    rows = [{"text": f"row {i}, again row {i} and once more\n"} for i in range(30)]
    more = write_rows(tmp_path / "more.jsonl", rows)
    job = replace(job, evaluation=replace(job.evaluation, more=(more,)))
    run = _run(job, tmp_path / "run")
    assert all(
        r["heldout_bits_per_byte/more"] > 0 for r in run.read_metrics() if "heldout_loss" in r
    )
    facts = json.loads((run.heldout_tokens.parent / "more-more.json").read_text())
    assert facts["num_bytes"] == sum(len(row["text"]) for row in rows)
    assert list(facts["files"]) == [more]
    write_rows(tmp_path / "more.jsonl", [*rows, {"txt": "x"}])
    with pytest.raises(DataError, match=r"more\.jsonl:31: has no field 'text'"):
        _run(job, tmp_path / "bad")


def test_worker_processes_change_nothing_but_the_time(job, tmp_path):
    alone = _run(replace(job, num_steps=1), tmp_path / "alone")
    others = _run(replace(job, num_steps=1, num_workers=2), tmp_path / "others")
    for name in ("train_tokens", "heldout_tokens"):
        assert getattr(alone, name).read_bytes() == getattr(others, name).read_bytes()


def test_a_text_that_spells_the_end_of_text_is_one_document(job, tmp_path):
    texts = [{"text": f"{row['text']}<|endoftext|>"} for row in TEXTS]
    job = replace(job, data=write_rows(tmp_path / "ends.jsonl", texts), num_steps=1)
    run = _run(replace(job, num_workers=1), tmp_path / "run")
    tokens = [*tokens_of(run)[0], *tokens_of(run)[1]]
    assert sum(token == 0 for token in tokens) == len(texts) + 2


@pytest.mark.parametrize(("level", "tolerance"), [("O0", 0.0), ("O1", 1e-4)])
def test_a_compiled_step_learns_what_an_eager_one_does(level, tolerance, job, tmp_path):
    """O0 has eager's bits; O1 rounds otherwise, and a few steps do not part the losses."""
    eager, compiled = (
        _run(replace(job, level=each, document_boundaries=True), tmp_path / each)
        for each in ("eager", level)
    )
    losses = [
        [record["loss"] for record in run.read_metrics() if "loss" in record]
        for run in (eager, compiled)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=tolerance, abs=0)


def test_documents_are_kept_apart_on_request(job, tmp_path):
    # So many samples that some of them hold the end of a document.
    job = replace(job, evaluation=replace(job.evaluation, samples=64))
    losses = {}
    for boundaries in (False, True):
        run = _run(replace(job, document_boundaries=boundaries), tmp_path / f"{boundaries}")
        losses[boundaries] = [r["loss"] for r in run.read_metrics() if "loss" in r]
    assert losses[False] != losses[True]
    last = run.read_metrics()[-1]["heldout_loss"]
    model = load_model(run.model)
    scoring = Scoring(context=32, stride=32, dtype="float32")
    facts = run.read_corpus()["num_bytes"]["heldout"]
    scored = {
        end: evaluate(
            model,
            tokens_of(run)[1],
            num_bytes=facts,
            scoring=scoring,
            most_windows=64,
            end_of_text=end,
        )
        for end in (0, None)
    }
    assert scored[0].nats / scored[0].num_tokens == pytest.approx(last, rel=1e-5)
    assert abs(scored[None].nats / scored[None].num_tokens - last) > 1e-4 * last
    layout = layout_of_stream(torch.tensor([[5, 0, 7, 8, 0, 9]]), end_of_text=0)
    assert layout.segments.tolist() == [[0, 1, 1, 1, 2, 2]]
    assert layout.positions.tolist() == [[0, 0, 1, 2, 0, 1]]


def test_the_folder_says_on_what_the_run_was_made(job, tmp_path):
    run = _run(job, tmp_path / "run")
    (line,) = run.environment.read_text().splitlines()
    facts = json.loads(line)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["num_threads"] == torch.get_num_threads()


def test_tensorboard_is_asked_for_where_it_is_missing(job, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match="pip install tensorboard"):
        _run(replace(job, tensorboard=True), tmp_path / "run")


def test_tensorboard_gets_every_number_by_step(job, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = _run(replace(job, tensorboard=True), tmp_path / "run")
    events = EventAccumulator(str(run.events)).Reload()
    written = {r["step"]: r["loss"] for r in run.read_metrics() if "loss" in r}
    shown = {e.step: e.value for e in events.Scalars("loss")}
    assert shown == pytest.approx(written, rel=1e-6)
    assert [e.step for e in events.Scalars("heldout_loss")] == [3, 6]


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("wsd", [0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325]),
        ("linear", [0.5, 1, 1, 0.8875, 0.775, 0.6625, 0.55, 0.4375, 0.325, 0.2125]),
    ],
)
def test_a_schedule_is_its_picture(schedule, rates):
    settings = OptimizerSettings(
        schedule=schedule,
        learning_rate=1.0,
        warmup_steps=2,
        final_fraction=0.1,
        decay_fraction=0.4,
    )
    found = [settings.learning_rate_at(step, 10) for step in range(10)]
    assert found == pytest.approx(rates)


def test_work_is_counted_by_the_weights_that_a_token_meets():
    shape = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_size": 16,
    }
    config = DecoderConfig(**shape)
    dense = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64) + 32 * 100
    assert num_matrix_weights(Decoder(config), config) == dense
    tied = replace(config, tie_embeddings=True)
    assert num_matrix_weights(Decoder(tied), tied) == dense
    experts = ExpertSettings(num_experts=8, experts_per_token=2, intermediate_size=64)
    sparse = replace(config, experts=experts)
    one_more = 2 * (3 * 32 * 64 + 32 * 8)  # a second expert and the router, in two layers
    assert num_matrix_weights(Decoder(sparse), sparse) == dense + one_more
    # A score and its use are 2 * 2 * 16 operations a head and pair, three times over, half seen.
    flops = training_flops_per_token(config, num_matrix=dense, length=64)
    assert flops == 6 * dense + 2 * 3 * (2 * 2 * 16) * 2 * 32


def test_a_device_is_known_by_its_name():
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA H200") == 989e12
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_of("NVIDIA H100 NVL") == 835e12
    assert peak_of("NVIDIA B200") == 2250e12
    assert peak_of("NVIDIA RTX A1000") is None
    assert peak_of("GeForce 256") is None


def test_utilization_is_known_where_the_device_is(monkeypatch):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1}
    model = Decoder(DecoderConfig(vocab_size=100, num_layers=2, head_size=16, **shape))
    names = iter(["NVIDIA H100 80GB HBM3", "GeForce 256"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    where = {"model": model, "config": model.config, "length": 64}
    found = utilization_on(torch.device("cuda"), **where)
    assert found.of(1e6) == pytest.approx(1e6 * found.flops_per_token / 989e12)
    assert utilization_on(torch.device("cuda"), **where) is None
    assert utilization_on(torch.device("cpu"), **where) is None


def test_a_damaged_run_hides_no_other(job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (2, 10):
        _run(replace(job, num_steps=1), tmp_path / "runs" / f"stdlib_demo-{number}")
    broken = tmp_path / "runs" / "stdlib_demo-3"
    RunFolder(broken).write_job(job)
    (broken / "metrics.jsonl").write_text('{"step": 1, "loss": 2\n{"step": 2}\n')
    result = CliRunner().invoke(app, ["runs"])
    names = [line.split()[0] for line in result.stdout.splitlines()[1:]]
    assert names == ["runs/stdlib_demo-2", "runs/stdlib_demo-10"]
    assert "metrics.jsonl:1 is no record of a step" in result.stderr
    named = CliRunner().invoke(app, ["runs", str(broken)])
    assert "metrics.jsonl:1 is no record" in str(named.exception)


def test_runs_are_listed_and_compared(job, tmp_path):
    first = _run(job, tmp_path / "first")
    other = replace(job, seed=1, optimizer=replace(job.optimizer, schedule="wsd"))
    second = _run(other, tmp_path / "second")
    page = tmp_path / "compare.html"
    names = [str(first.path), str(second.path)]
    result = CliRunner().invoke(app, ["runs", *names, "--html", str(page)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[1].split()[:3] == [names[0], "stdlib_demo", "6"]
    differing = {line.split()[0]: line.split()[1:] for line in lines[lines.index("") + 3 :]}
    assert differing == {"optimizer.schedule": ["cosine", "wsd"], "seed": ["0", "1"]}
    assert page.read_text().count("<polyline") == 4
    as_json = json.loads(CliRunner().invoke(app, ["runs", *names, "--json"]).output)
    scores = [r["heldout_loss"] for r in first.read_metrics() if "heldout_loss" in r]
    assert as_json["runs"][names[0]]["best_heldout_loss"] == min(scores)
