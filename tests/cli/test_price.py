"""plait price, plait calibrate and plait compare, as commands."""

import json
import sys
import warnings

import pytest

from plait.cli.large_job import large_job
from plait.cli.main import main
from plait.cost.accelerators import find_cluster
from plait.cost.table import Table
from plait.errors import ConfigError
from tests.forked_process import run_plait


def test_price_writes_figures_a_page_and_a_trace(tmp_path):
    page, trace = tmp_path / "report.html", tmp_path / "trace.json"
    done = run_plait(
        *("price", "stdlib_demo", "--world", 4, "--set", "plan.tp=2", "--json"),
        *("--html", page, "--trace", trace, "--dollars", 2),
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["num_ranks"] == 4
    assert figures["memory"]["peak_bytes"] >= figures["first_memory"]["peak_bytes"] > 0
    cost = 1e9 / figures["tokens_per_s"] / 3600 * 4 * 2
    assert figures["dollars_per_billion_tokens"] == pytest.approx(cost)
    assert figures["binding"] in page.read_text()
    assert 0 < figures["low_s"] <= figures["step_s"] <= figures["high_s"]
    text = page.read_text()
    for part in ("id='streams'", 'id="memory"', "id='ledger'", "saved activations"):
        assert part in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert json.loads(trace.read_text())["traceEvents"]
    same = tmp_path / "same.json"
    same.write_text(done.stdout)
    compared = run_plait("compare", same, same)
    assert compared.returncode == 0, compared.stderr
    assert "+0.00%" in compared.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stdlib_demo", "--cluster", "h1000"], "Did you mean 'h100'"),
        (["stdlib_demo", "--world", "3", "--set", "plan.tp=2"], "--world is 3. Choose from"),
        (["stdlib_demo", "--set", "plan.tq=2"], "a plan has no field 'tq'. Did you mean 'tp'"),
        (["stdlib_dem"], "Did you mean 'stdlib_demo'"),
        (["llama_8b"], "Did you mean 'llama3_8b'"),
        (["stdlib_demo", "--dollars", "-1"], "--dollars is what a device costs in an hour, got -1"),
        (["sft"], "price that, plait price MODEL_FOLDER"),
        (["llama3_8b", "--world", "-64"], "--world must be at least 1, got -64"),
        (["llama3_8b", "--world", "64", "--set", "plan.pp=3"], "plan.pp (now 3) from 1, 2, 4, 8,"),
    ],
    ids=["cluster", "world", "plan", "recipe", "model", "dollars", "tuning", "below 0", "divisors"],
)
def test_a_mistake_is_one_line_that_says_what_to_do(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plait", "price", *arguments])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets its own
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_world_of_none_is_refused_by_its_name():
    with pytest.raises(ConfigError, match="--world must be at least 1, got 0"):
        large_job("llama3_8b", [], 0)


def test_a_large_job_without_a_world_has_as_many_ranks_as_its_plan_needs():
    done = run_plait(*("price", "llama3_8b", "--set", "plan.tp=8", "--set", "batch_size=8"))
    assert done.returncode == 0, done.stderr
    assert "llama3_8b on 8 ranks" in done.stdout


def test_a_step_that_does_not_fit_one_rank_is_printed_and_is_an_error():
    rows = ("--set", "batch_size=8192", "--set", "micro_batch_size=8192")
    done = run_plait("price", "stdlib_demo", *rows, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["fits"] is False
    assert "PlanError: stdlib_demo does not fit h100: " in done.stderr
    assert "GiB are missing" in done.stderr


NCCL_COLUMNS = "collective,num_ranks,ranks_per_node,num_bytes,time_us\n"


def test_price_of_a_recipe_takes_what_nccl_tests_measured(tmp_path):
    runs = tmp_path / "runs.csv"
    runs.write_text(f"{NCCL_COLUMNS}all_reduce,2,2,1,70\nall_reduce,2,2,1000000000,70\n")
    words = ("price", "stdlib_demo", "--set", "plan.tp=2", "--nccl", runs, "--json")
    done = run_plait(*words)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["sources"]["measured"]
    assert measured["num_operators"] > 0
    assert measured["seconds"] == pytest.approx(measured["num_operators"] * 70e-6)


def test_price_takes_the_table_of_a_gpu_for_the_cluster_that_has_it(tmp_path):
    table, device = tmp_path / "table.json", find_cluster("h100", 1).device
    table.write_text(Table("NVIDIA H100 80GB HBM3", (), device, launch_s=1e-3).to_json())
    words = ("price", "stdlib_demo", "--json", "--table", table, "--cluster")
    done = run_plait(*words, "h100")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    count = sum(each["num_operators"] for each in figures["sources"].values())
    assert figures["step_s"] > count * 1e-3  # each launch takes what the table says of it
    refused = run_plait(*words, "h200")
    assert refused.returncode == 1
    assert "the table was measured on h100, and the cluster h200 is of h200" in refused.stderr


@pytest.mark.exhaustive
def test_calibrate_writes_a_table_that_price_takes(tmp_path):
    table = tmp_path / "table.json"
    done = run_plait("calibrate", "--quick", "--steps", 2, "--out", table)
    assert done.returncode == 0, done.stderr
    assert Table.load(table).entries
    priced = run_plait(*("price", "stdlib_demo", "--cluster", "cpu", "--table", table, "--json"))
    assert priced.returncode == 0, priced.stderr
    assert json.loads(priced.stdout)["sources"]["interpolated"]["num_operators"] > 0
