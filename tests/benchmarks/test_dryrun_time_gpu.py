"""What a GPU's step times are measured with, here on the CPU."""

import subprocess
import sys

import pytest
import torch

from benchmarks.dryrun_recipes import Recipe
from benchmarks.dryrun_time_gpu import RECIPES, measure_on
from benchmarks.result import ROOT

SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2}


def test_configurations_are_many_and_differ():
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES) >= 16
    for recipe in RECIPES:
        assert recipe.batch % recipe.micro_batches == 0
        assert recipe.ranks == 1


@pytest.mark.slow
def test_the_same_code_measures_and_compares_on_a_cpu(capsys):
    torch.set_num_threads(1)
    recipes = [
        Recipe(name=f"{rows} rows", changes=SMALL, batch=rows, tokens=64) for rows in (1, 2, 3, 4)
    ]
    rows = {row.claim: row for row in measure_on("cpu", "cpu", recipes, 3)}
    (median,) = (row for claim, row in rows.items() if "unseen: median error" in claim)
    assert len(median.samples) == 4
    assert median.target == 5.0
    assert all(rows[f"{recipe.name}: step time, error"].samples[0] < 300 for recipe in recipes)
    assert "never profiled" in " ".join(rows)
    assert "every other configuration unseen" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_that_nothing_was_measured():
    command = [sys.executable, "-m", "benchmarks.dryrun_time", "--device", "cuda", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "PyTorch sees no GPU here, so nothing was measured" in done.stderr
