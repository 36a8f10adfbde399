"""After a hit in the compile cache: whatever the program reads is compared, at each later call."""

import json
from pathlib import Path

import pytest

from .stored_program import run_program

PROGRAM = """
import dataclasses, json, os, sys
import torch
from torch import nn
import plait
import settings

@dataclasses.dataclass(frozen=True)
class Frozen:
    scale: float = 2.0

class Config:
    scale = 2.0

def double(x, factor=2.0):
    return x * factor

def triple(x):
    return x * 3

SIZES, KINDS, NAMES = [1.0, 2.0], {1, 2}, {"a": 2.0}
CONFIG, FROZEN, NUMBER = Config(), Frozen(), 2.0
activation = torch.relu
os.environ["GAIN"] = "2"
settings.gain = 2.0 if "--gain" not in sys.argv else 5.0

class Model(nn.Module):
    bias = 1.0

    def __init__(self, kind):
        super().__init__()
        self.layer, self.kind, self.gains, self.kinds = nn.Linear(8, 8), kind, [2.0], {1, 2}
        self.named = {"a": 2.0, "b": 3.0}

    def forward(self, x):
        y = self.layer(x)
        match self.kind:
            case "appended": return y * sum(SIZES)
            case "class": return y * CONFIG.scale
            case "instance": return y * CONFIG.scale + 1
            case "defaults": return double(y)
            case "code": return double(y) + 1
            case "environ": return y * float(os.environ["GAIN"])
            case "rebound": return y * FROZEN.scale
            case "number": return y * NUMBER
            case "set": return y * len(KINDS)
            case "own set": return y * (3 if 3 in self.kinds else 2)
            case "key": return y * (3 if "c" in NAMES else 2)
            case "own key": return y * (3 if "c" in self.named else 2)
            case "own list": return y * self.gains[0]
            case "class of the module": return y * self.bias
            case "function": return activation(y)
            case "imported": return y * settings.gain
            case "hook of a layer" | "hook of the model" | "hook of all": return y

def change(model):
    global FROZEN, NUMBER, activation
    match model.kind:
        case "appended": SIZES.append(5.0)
        case "class": Config.scale = 7.0
        case "instance": CONFIG.scale = 8.0
        case "defaults": double.__defaults__ = (3.0,)
        case "code": double.__code__ = (lambda x, factor: x - factor).__code__
        case "environ": os.environ["GAIN"] = "9"
        case "rebound": FROZEN = Frozen(8.0)
        case "number": NUMBER = 5.0
        case "set": KINDS.add(3)
        case "own set": model.kinds.add(3)
        case "key": NAMES["c"] = NAMES.pop("a")
        case "own key": model.named = {"a": model.named["a"], "c": model.named["b"]}
        case "own list": model.gains[0] = 4.0
        case "class of the module": Model.bias = 4.0
        case "function": activation = triple
        case "imported": settings.gain = 3.0
        case "hook of a layer": model.layer.register_forward_hook(lambda m, a, out: out * 2)
        case "hook of the model": model.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
        case "hook of all":
            nn.modules.module.register_module_forward_hook(lambda m, a, out: out * 2)

found = {}
for kind in json.loads(sys.argv[1]):
    torch._dynamo.reset()
    Config.scale, Model.bias = 2.0, 1.0
    vars(CONFIG).clear()
    torch.manual_seed(0)
    model, x = Model(kind), torch.randn(4, 8)
    compiled = plait.jit((lambda x: model(x)) if kind == "hook of all" else model)
    before = torch.equal(compiled(x), model(x))
    report = compiled.report()
    from_cache, notes = report.from_cache, list(report.notes)
    output = model(x)
    change(model)
    assert not torch.equal(model(x), output), kind
    found[kind] = [before, from_cache, notes, torch.equal(compiled(x), model(x))]
print(json.dumps(found))
"""

KINDS = [
    "appended",
    "class",
    "instance",
    "defaults",
    "code",
    "environ",
    "rebound",
    "number",
    "set",
    "own set",
    "key",
    "own key",
    "own list",
    "class of the module",
    "function",
    "imported",
    "hook of a layer",
    "hook of the model",
    "hook of all",
]


def run(folder: Path, kinds: list[str], *arguments: str) -> dict[str, list]:
    return run_program(folder, json.dumps(kinds), *arguments, anew=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.py").write_text(PROGRAM)
    (folder / "settings.py").write_text("gain = 1.0\n")
    return folder


@pytest.fixture(scope="module")
def processes(folder):
    return run(folder, KINDS), run(folder, KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_program_reads_may_change_after_a_hit(processes, kind):
    first, second = processes
    assert first[kind] == [True, False, [], True]
    assert second[kind] == [True, True, [], True]


def test_what_differs_in_the_next_process_is_no_hit(folder, processes):
    assert run(folder, ["imported"], "--gain")["imported"] == [True, False, [], True]
    assert run(folder, ["imported"], "--gain")["imported"][:2] == [True, True]
