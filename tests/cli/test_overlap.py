"""`plait overlap` as a user meets it: a real process, its table, its files, its errors."""

import json

import pytest
from typer.testing import CliRunner

from plait.cli.main import app
from plait.errors import CheckpointError, ConfigError, PlanError
from tests.forked_process import run_plait

pytestmark = pytest.mark.slow
SMALL = ("--width", "256", "--layers", "2", "--tokens", "128", "--tp", "2", "--rounds", "2")


def overlap(*arguments, cwd):
    return run_plait("overlap", *arguments, cwd=cwd)


def test_the_small_llama_is_measured_and_the_files_are_written(tmp_path):
    # Messages take much longer than computing, so that no noise of the machine can hide them.
    link = ("--latency", "0.05", "--bandwidth", "1e9")
    files = ("--html", "page.html", "--trace", "trace.json")
    result = overlap(*SMALL, *link, *files, "--replicas", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = {line[:25].strip(): line[25:].split() for line in result.stdout.splitlines()}
    assert result.stdout.startswith("Llama, width 256, 2 layers, split along the tokens")
    assert lines["replicas"] == ["2", "2"]
    assert len(lines["net hidden"]) == len(lines["net hidden, predicted"]) == 2
    # Four messages of each direction, one after the other.
    assert all(float(x) >= 4 * 50 for x in lines["T0   unsplit, ms"])
    assert all(float(x) >= 8 * 50 for x in lines["Ts   split, ms"])
    assert "messages are delayed, not sent" in result.stdout
    assert "link: 5e+04 us and 1 GB/s" in result.stdout
    assert (tmp_path / "page.html").read_text().count("<svg") == 2
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    titles = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert titles == [
        "forward, unsplit",
        "forward, 2 replicas",
        "backward, unsplit",
        "backward, 2 replicas",
    ]


def test_a_model_folder_is_read_and_the_figures_come_as_json(tmp_path):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
    folder = tmp_path / "llama_tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    size = ("--tokens", "64", "--batch", "2", "--tp", "2", "--rounds", "2", "--sp")
    result = overlap(
        str(folder), *size, "--ratio", "20", "--json", "--dtype", "bfloat16", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["model"] == "llama_tiny"
    for direction in ("forward", "backward"):
        assert report["directions"][direction]["figures"]["communication / compute"] > 1
        assert len(report["directions"][direction]["net hidden, rounds"]) == 2
        assert report["predicted"][direction]["seconds"]["unsplit_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--replicas", "7"), ConfigError, "must be auto or a number from 1 to 4, got '7'"),
        (("--axis", "tokens"), ConfigError, "Did you mean 'token'"),
        (("--dtype", "float8"), ConfigError, "Known: bfloat16, float32"),
        (("--width", "100"), ConfigError, "multiple of 64, got 100"),
        (("--latency", "1e-5"), ConfigError, "give both"),
        (("--latency", "1", "--bandwidth", "1", "--ratio", "1"), ConfigError, "give one"),
        (("--latency", "1", "--bandwidth", "0"), PlanError, "bandwidth must be positive"),
        (("--ratio", "0"), PlanError, "must be positive"),
        (("--rounds", "0"), PlanError, "at least one round"),
        (("--threads", "0"), ConfigError, "at least 1"),
        (("--tokens", "0"), ConfigError, "at least 1, got 1 and 0"),
        (("--tp", "3"), PlanError, "tp=3 does not divide"),
        (("nowhere",), CheckpointError, "nowhere has no config.json"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else None,
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_bad_input_is_a_clear_error(arguments, error, message):
    given = () if arguments == ("nowhere",) else SMALL
    result = CliRunner().invoke(app, ["overlap", *given, *arguments])
    assert type(result.exception) is error
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_what_cannot_be_split_ends_in_one_line(tmp_path):
    result = overlap(*SMALL, "--batch", "3", "--replicas", "4", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = [x for x in result.stderr.splitlines() if "Error" in x]
    assert line.startswith("PlanError: replicas=4 of a batch of 3")
    assert "Traceback" not in result.stderr
