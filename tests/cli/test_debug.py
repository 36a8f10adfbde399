"""`plait debug` as a user meets it: a script with a fault, in a real process."""

import os
import re

import pytest
from safetensors.torch import load_file

from tests.forked_process import run_plait

SCRIPT = """\
import sys

import torch
from torch import nn

import plait


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        h = torch.relu(self.up(x))
        share = h / h.sum(-1, keepdim=True)
        if torch.compiler.is_compiling() and "wrong" in sys.argv:
            share = share * 1.25
        return x + self.down(share)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


if __name__ == "__main__":
    model = Model()
    if "nan" in sys.argv:
        nn.init.constant_(model.blocks[1].up.bias, -100.0)
    compiled = torch.compile(model, backend="plait") if "compile" in sys.argv else plait.jit(model)
    for _ in range(2):
        loss = compiled(torch.randn(4, 8))
        loss.backward()
        print("loss", loss.item())
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def debug(folder, *arguments, typed=""):
    environment = os.environ | {"PLAIT_CACHE": str(folder / "cache")}
    return run_plait("debug", *arguments, cwd=folder, input=typed, env=environment)


@pytest.mark.parametrize("how", ["jit", pytest.param("compile", marks=pytest.mark.slow)])
def test_it_names_the_step_line_and_layer_that_make_nan(folder, how):
    result = debug(folder, "script.py", "--nan", "--", "nan", how)
    assert result.returncode == 0, result.stderr
    assert "stopped at the first NaN" in result.stderr
    assert "loss" not in result.stdout
    text = result.stdout.splitlines()
    assert text[0] == "NaN was made by"
    assert text[1].endswith("/div = aten.div.Tensor")
    assert "(blocks.1), in the program forward, run 1, of graph 1 (" in text[2]
    assert text[3].endswith("script.py:17, in forward: share = h / h.sum(-1, keepdim=True)")
    assert text[-1].strip() == "made f32[4, 16]  64 NaN (of 64 elements)"


def test_a_prompt_opens_at_a_line(folder):
    typed = "print('shape', value.shape, sorted(operands))\nexit()\n"
    result = debug(folder, "script.py", "--break-at", "script.py:16", typed=typed)
    assert "forward: h = torch.relu(self.up(x))" in result.stderr
    assert "shape torch.Size([8, 16]) ['" in result.stdout
    assert "loss" not in result.stdout


def test_a_run_without_nan_goes_to_its_end_and_chosen_tensors_are_written(folder):
    result = debug(folder, "script.py", "--nan", "--dump", "out", "--tensors", "forward/*/relu")
    assert result.returncode == 0, result.stderr
    *losses, search, written = result.stdout.splitlines()
    assert [line.split()[0] for line in losses] == ["loss", "loss"]
    assert search == "No step made NaN, or Inf of finite values."
    assert written == "6 steps written to out"
    files = sorted((folder / "out").iterdir())
    assert len(files) == 6
    tensors = load_file(files[0])
    assert tensors["result"].equal(tensors["operand.addmm"].relu())


def test_the_first_difference_from_eager_is_named(folder):
    result = debug(folder, "script.py", "--compare", "eager", "--", "wrong")
    assert result.returncode == 0, result.stderr
    assert "The first step that does not:" in result.stdout
    assert "script.py:19, in forward: share = share * 1.25" in result.stdout
    assert "the nearest, made by aten.div.Tensor" in result.stdout


def test_a_run_is_compared_with_one_that_was_recorded(folder):
    kept = debug(folder, "script.py", "--record", "first.safetensors")
    assert kept.returncode == 0, kept.stderr
    assert re.search(r"\d+ steps kept in first.safetensors$", kept.stdout.strip())
    same = debug(folder, "script.py", "--compare", "first.safetensors")
    assert re.search(r"^\d+ steps made the same, 0 something else$", same.stdout, re.MULTILINE)
    text = (folder / "script.py").read_text()
    (folder / "script.py").write_text(
        text.replace("torch.relu(self.up(x))", "torch.relu(self.up(x) + 1)")
    )
    other = debug(folder, "script.py", "--compare", "first.safetensors")
    assert other.returncode == 0, other.stderr
    assert "the first that differs:" in other.stdout
    assert "script.py:16, in forward: h = torch.relu(self.up(x))" in other.stdout
    assert "steps are only in the second run" in other.stdout
    wrong = debug(folder, "script.py", "--compare", "script.py")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines()[-1].startswith("GraphError: script.py is no recording")


@pytest.mark.slow
def test_an_equal_run_is_equal_to_eager_also_from_the_cache(folder):
    for _ in range(2):
        result = debug(folder, "script.py", "--compare", "eager")
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith(
            "steps made what eager makes, bit for bit. No step differs.\n"
        )
        assert result.stdout.count("loss") == 2


@pytest.mark.slow
def test_without_options_every_operator_is_listed(folder):
    result = debug(folder, "script.py")
    assert result.returncode == 0, result.stderr
    assert "\n  relu = aten.relu.default: f32[4, 16]  0 to " in result.stdout
    assert "(blocks.2), in the program backward of graph 1 (" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("script.py", "--tensors", "relu"), "Give the folder too: --dump DIR"),
        (("nowhere.py",), "no script 'nowhere.py'"),
        (("script.py", "--break-at", "rellu"), "Did you mean 'relu'?"),
    ],
    ids=["tensors without a folder", "no script", "no such step"],
)
def test_a_mistake_ends_in_one_line_that_says_what_to_do(folder, arguments, text):
    result = debug(folder, *arguments)
    assert result.returncode == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_script_that_compiles_nothing_is_told_so(folder):
    (folder / "eager.py").write_text("print('nothing compiled')\n")
    result = debug(folder, "eager.py", "--nan")
    assert result.returncode == 0
    assert "no compiled program was loaded" in result.stderr


@pytest.mark.slow
def test_an_exception_of_the_script_is_shown_as_python_shows_it(folder):
    with (folder / "script.py").open("a") as file:
        file.write("    raise FileNotFoundError('no data')\n")
    result = debug(folder, "script.py", "--nan")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "FileNotFoundError: no data"
    assert "runpy" not in result.stderr
    assert "No step made NaN" in result.stdout
