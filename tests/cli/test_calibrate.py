"""`plait calibrate` and `plait compare` with what people mistype."""

import json
import sys
import warnings

import pytest
import torch

from plait.cli.calibrate import LADDERS, model_config
from plait.cli.main import main
from plait.cost.accelerators import cluster_of_gpu
from plait.cost.table import Table


def refused(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plait", *map(str, arguments)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def test_calibrate_refuses_before_it_measures(tmp_path, monkeypatch, capsys):
    nowhere = tmp_path / "missing" / "table.json"
    assert "cannot be written" in refused(["calibrate", "--out", nowhere], monkeypatch, capsys)
    assert "cannot be written" in refused(["calibrate", "--out", tmp_path], monkeypatch, capsys)
    assert "at least 1" in refused(["calibrate", "--steps", 0], monkeypatch, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_calibrate_of_a_gpu_is_refused_where_there_is_none(tmp_path, monkeypatch, capsys):
    words = ["calibrate", "--device", "cuda", "--quick", "--out", tmp_path / "table.json"]
    printed = refused(words, monkeypatch, capsys)
    assert printed.startswith("ConfigError: --device cuda: PyTorch sees no GPU")
    assert not (tmp_path / "table.json").exists()


def test_a_device_that_cannot_be_measured_names_those_that_can(monkeypatch, capsys):
    printed = refused(["calibrate", "--device", "cudo"], monkeypatch, capsys)
    assert "no device 'cudo' to measure. Did you mean 'cuda'" in printed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to measure")
def test_a_table_of_a_gpu_is_of_the_cluster_that_has_it(tmp_path, monkeypatch):
    out = tmp_path / "table.json"
    words = ["plait", "calibrate", "--device", "cuda", "--quick", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (None, 0)
    table = Table.load(out)
    assert table.device.name == cluster_of_gpu(torch.cuda.get_device_name())
    assert table.machine == torch.cuda.get_device_name()
    assert table.entries


@pytest.mark.parametrize("device", LADDERS)
def test_every_dtype_is_measured_on_every_architecture(device):
    ladder = LADDERS[device]
    both = ladder.sizes([torch.float32, torch.bfloat16])
    assert len(both) == 2 * len(ladder.sizes([torch.float32]))
    assert {each.architecture for each in both if each.dtype is torch.bfloat16} >= {
        "LlamaForCausalLM",
        "GPT2LMHeadModel",
        "Gemma2ForCausalLM",
        "MixtralForCausalLM",
    }
    assert max(each.width for each in both) == max(ladder.widths)


@pytest.mark.parametrize("device", LADDERS)
def test_every_model_of_the_ladder_is_made_without_a_warning(device):
    for size in LADDERS[device].sizes([torch.float32]):
        config = model_config(size)
        assert config.hidden_size == size.width
        assert config.head_size == size.head_size
        assert config.num_layers == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds a list, not an object"),
        ("{", "is not JSON"),
        ("{}", "no figure in common"),
        ('{"step_s": "long"}', "are not both finite numbers"),
        ('{"step_s": NaN}', "are not both finite numbers"),
    ],
    ids=["list", "broken", "empty", "text", "nan"],
)
def test_compare_says_what_is_wrong_with_a_file(text, message, tmp_path, monkeypatch, capsys):
    predicted, measured = tmp_path / "predicted.json", tmp_path / "measured.json"
    predicted.write_text(json.dumps({"step_s": 1.0, "memory": {"peak_bytes": 5}}))
    measured.write_text(text)
    printed = refused(["compare", predicted, measured], monkeypatch, capsys)
    assert message in printed


def test_compare_of_a_missing_file_names_it(tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone.json"
    assert "gone.json" in refused(["compare", gone, gone], monkeypatch, capsys)


def test_compare_as_json_is_json_where_nothing_was_measured(tmp_path, monkeypatch, capsys):
    predicted, measured = tmp_path / "predicted.json", tmp_path / "measured.json"
    predicted.write_text('{"step_s": 1.1, "operators_s": {"mm": 1.0, "add": 0.5}}')
    measured.write_text('{"step_s": 1.0, "operators_s": {"mm": 2.0}}')
    monkeypatch.setattr(sys, "argv", ["plait", "compare", str(predicted), str(measured), "--json"])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    errors = {each["name"]: each["error"] for each in found}
    assert errors == {"step_s": pytest.approx(0.1), "mm": -0.5, "add": None}
