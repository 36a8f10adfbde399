import json
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from plait.cli.large_job import large_job, price_large_job, size_of
from plait.cli.main import app
from plait.errors import ConfigError, PlanError

SMALL = [
    "model.num_layers=4",
    "model.hidden_size=1024",
    "model.intermediate_size=2048",
    "model.num_heads=8",
    "model.vocab_size=1024",
    "sequence_length=1024",
    "batch_size=16",
]
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")


def test_a_search_prints_plans_reasons_and_a_comparison():
    settings = [word for setting in SMALL for word in ("--set", setting)]
    words = ["search", "llama3_8b", "--world", "4", "--memory", "4GiB", "--explain", "1", "2"]
    result = CliRunner().invoke(app, [*words, *settings])
    assert result.exit_code == 0, result.output
    assert "legal plans" in result.output
    assert "matrix products" in result.output


def test_settings_of_the_plan_hold_for_all_plans_and_an_explanation_is_in_the_json():
    settings = [*SMALL, "plan.pp=2", "micro_batch_size=8"]
    words = [word for setting in settings for word in ("--set", setting)]
    command = ["search", "llama3_8b", "--world", "4", "--json", "--explain", "1", "2", *words]
    found = json.loads(CliRunner().invoke(app, command).stdout)
    assert {(each["plan"]["pp"], each["micro_batch_size"]) for each in found["best"]} == {(2, 8)}
    assert "matrix products" in found["explanation"]


def test_a_search_prices_messages_as_nccl_tests_measured_them(tmp_path):
    runs = tmp_path / "runs.csv"
    runs.write_text(
        "collective,num_ranks,ranks_per_node,num_bytes,time_us\n"
        + "".join(f"{each},2,2,{n},500000\n" for each in COLLECTIVES for n in (1, 10**10))
    )
    settings = [word for setting in SMALL for word in ("--set", setting)]
    words = ["search", "llama3_8b", "--world", "2", "--json", *settings]
    modelled, measured = (
        json.loads(CliRunner().invoke(app, [*words, *more]).stdout)
        for more in ([], ["--nccl", str(runs)])
    )
    assert modelled["best"][0]["plan"]["pp"] == 1
    assert modelled["best"][0]["step_s"] < 0.5
    for each in measured["best"]:  # stages send to one another, which is no collective
        assert each["plan"]["pp"] == 2 or each["step_s"] >= 0.5
    assert measured["best"][0]["plan"]["pp"] == 2


def test_a_large_job_is_priced_as_text_and_as_json(capsys, tmp_path):
    trace = tmp_path / "pipeline.json"
    settings = [*SMALL, "plan.pp=2"]
    price_large_job("llama3_8b", world=4, cluster="h100", settings=settings, trace=trace)
    assert "MFU" in capsys.readouterr().out
    assert json.loads(trace.read_text())["traceEvents"]
    price_large_job("llama3_8b", world=4, cluster="h100", settings=settings, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["fsdp"] == 2
    assert found["fits"]


def test_a_large_job_has_a_page(tmp_path):
    page = tmp_path / "job.html"
    settings = [*SMALL, "plan.pp=2"]
    price_large_job("llama3_8b", world=4, cluster="h100", settings=settings, html=page)
    assert 'id="pipeline"' in page.read_text()


def test_plans_to_explain_are_checked_before_the_search():
    words = ["search", "llama3_8b", "--world", "4", "--explain", "1", "11"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, ConfigError)
    assert "1 to 10" in str(result.exception)


@pytest.mark.slow
def test_ctrl_c_prints_the_best_so_far():
    code = "from plait.cli.main import main; main()"
    # So many plans that it does not end before the signal comes.
    many = [*SMALL[:-1], "batch_size=16384"]
    settings = [word for setting in many for word in ("--set", setting)]
    words = ["search", "llama3_8b", "--world", "4096", *settings]
    started = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stderr is not None
    for line in started.stderr:
        if ", best " in line:
            break
    started.send_signal(signal.SIGINT)
    printed, complaint = started.communicate(timeout=120)
    assert started.returncode == 0, complaint
    assert "(stopped early)" in printed
    assert "  1 " in printed


def test_a_job_that_does_not_fit_is_an_error_with_what_is_missing():
    with pytest.raises(PlanError, match="GiB are missing"):
        price_large_job("llama3_8b", world=4, cluster="h100", settings=SMALL, memory="1GiB")


@pytest.mark.parametrize(
    ("text", "size"), [("72GiB", 72 * 2**30), ("1.5 GB", 15 * 10**8), ("7", 7)]
)
def test_sizes_are_read_with_their_units(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["72gib", "GiB", "-1GiB", "0GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="--memory"):
        size_of(text)


def test_fsdp_takes_the_ranks_that_are_left_unless_it_is_given():
    assert large_job("llama3_70b", [], 1024).plan.fsdp == 32
    assert large_job("llama3_70b", ["plan.tp=4"], 1024).plan.fsdp == 64
    assert large_job("llama3_70b", ["plan.fsdp=8"], 1024).plan.fsdp == 8


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'llama3_70b'"):
        large_job("llama3_7b0", [], 8)
