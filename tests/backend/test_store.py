"""The compile cache: a second process starts from disk, and never from a stale or broken entry."""

from pathlib import Path

import pytest

from .stored_program import run_program

PROGRAM = """
import json, sys
import torch
import plait
from model import Model

torch.manual_seed(0)
model = Model()
if "--wide" in sys.argv:
    model.layers[1].gain = 2.0
x = torch.randn(5, 8)
compiled = plait.jit(lambda x: {"loss": model(x).square().mean(), "rows": x.shape[0]})
out = compiled(x)
out["loss"].backward()
if "--change" in sys.argv:
    model.layers[0].gain = 3.0
    model.zero_grad()
    out = compiled(x)
    out["loss"].backward()
if "--half" in sys.argv:
    model.double()
    model.zero_grad()
    x = x.double()
    out = compiled(x)
    out["loss"].backward()
found = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
expected = model(x).square().mean()
expected.backward()
same = torch.equal(out["loss"], expected) and all(
    torch.equal(p.grad, g) for p, g in zip(model.parameters(), found)
)
report = compiled.report()
print(json.dumps({
    "same": same, "rows": out["rows"], "from_cache": report.from_cache, "notes": report.notes,
    "operators": sum(graph.num_operators for graph in report.graphs),
    "captured": "torch" in report.phases_s or report.phases_s["read"] > 0,
}))
"""

MODEL = """
import torch
from torch import nn

SLOPE = 0.5

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.inner = nn.Sequential(nn.Tanh())
        self.gain = 1.0

    def forward(self, x):
        return x + self.inner(self.up(x)) * self.gain * SLOPE

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def run(folder: Path, *arguments: str, anew: bool = False) -> dict:
    result = run_program(folder, *arguments, anew=anew)
    assert result["same"]
    assert result["rows"] == 5
    return result


def test_a_second_process_captures_nothing(folder):
    first = run(folder, anew=True)
    assert (first["from_cache"], first["notes"]) == (False, [])
    second = run(folder, anew=True)
    assert second["from_cache"]
    assert not second["captured"]


def test_a_changed_attribute_asks_for_another_entry(folder):
    run(folder)
    assert not run(folder, "--wide")["from_cache"]
    assert run(folder, "--wide")["from_cache"]


def test_a_change_after_a_hit_is_noticed(folder):
    run(folder)
    changed = run(folder, "--change")
    assert changed["from_cache"]
    assert changed["captured"]


def test_another_dtype_after_a_hit_is_noticed(folder):
    run(folder)
    assert run(folder, "--half")["captured"]


def test_a_changed_source_makes_an_entry_stale(folder):
    run(folder)
    (folder / "model.py").write_text(MODEL.replace("SLOPE = 0.5", "SLOPE = 0.25"))
    assert not run(folder)["from_cache"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_broken_entry_is_rebuilt(folder, damage):
    run(folder)
    (entry,) = (folder / "cache").glob("*.json")
    content = entry.read_text()
    half = len(content) // 2
    flipped = content[:half] + chr(ord(content[half]) ^ 1) + content[half + 1 :]
    entry.write_text({"cut": content[:half], "flip": flipped, "empty": ""}[damage])
    assert not run(folder)["from_cache"]
    assert run(folder)["from_cache"]


def test_the_report_counts_the_same_operators_from_the_cache(folder):
    assert run(folder)["operators"] == run(folder)["operators"] > 0


def test_an_entry_that_cannot_be_stored_leaves_nothing_behind(folder):
    run(folder)
    (entry,) = (folder / "cache").iterdir()
    entry.unlink()
    entry.mkdir()
    assert any("not kept in the compile cache" in note for note in run(folder)["notes"])
    assert list((folder / "cache").iterdir()) == [entry]


def test_a_length_after_the_second_is_not_captured_also_where_the_first_was_stored(tmp_path):
    (tmp_path / "program.py").write_text("""
import json
import torch
import plait
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
compiled = plait.jit(model)
counts = []
for length in (5, 6, 7, 8):
    x = torch.randn(length, 8)
    assert torch.equal(compiled(x), model(x))
    counts.append(len(compiled.report().graphs))
print(json.dumps({"counts": counts, "from_cache": compiled.report().from_cache}))
""")
    assert run_program(tmp_path) == {"counts": [1, 2, 2, 2], "from_cache": False}
    assert run_program(tmp_path) == {"counts": [1, 2, 2, 2], "from_cache": True}
