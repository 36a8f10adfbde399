"""Level O1 by every way in: close to O0, a kernel for each distinct island, and when it cannot."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import plait
from plait.executor.islands import compile_islands
from plait.executor.run import Runnable
from plait.graph.schedule import IslandProgram, Program, Ref, Step
from plait.models.decoder import Decoder, DecoderConfig

# Inductor's own modules, where this is the first test that imports them.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
CONFIG = DecoderConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_size=16,
    max_positions=32,
)


def model_and_tokens(dtype=torch.float32):
    torch.manual_seed(0)
    model = Decoder(CONFIG)
    model.initialize()
    return model.to(dtype), torch.randint(0, 96, (2, 33))


def loss_of(model, tokens):
    return model.loss(model(tokens[:, :-1]), tokens[:, 1:]) / tokens.numel()


def gradients(run, model, *inputs):
    model.zero_grad()
    value = run(*inputs)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters())]


def distance(found, exact):
    """Largest relative error of a tensor, by norm."""
    pairs = zip(found, exact, strict=True)
    return max(((x.double() - y).norm() / (y.norm() + 1e-30)).item() for x, y in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("schedules")


@pytest.mark.parametrize("way", ["jit", "torch.compile", "run"])
def test_every_way_in_is_as_close_to_float64_as_eager(way):
    model, tokens = model_and_tokens()
    double, _ = model_and_tokens(torch.float64)
    exact = gradients(lambda x: loss_of(double, x), double, tokens)
    eager = distance(gradients(lambda x: loss_of(model, x), model, tokens), exact)
    model.zero_grad()
    if way == "run":
        graph = plait.capture(model, tokens, loss=loss_of)
        schedule = plait.compile(graph, level="O1")
        value = plait.run(schedule, model, tokens)
        found = [value, *(p.grad for p in model.parameters())]
        assert "of them distinct" in schedule.report()
    else:
        torch._dynamo.reset()
        make = {
            "jit": lambda f: plait.jit(f, level="O1", cache=False),
            "torch.compile": lambda f: torch.compile(f, backend="plait", options={"level": "O1"}),
        }[way]
        found = gradients(make(lambda x: loss_of(model, x)), model, tokens)
    # Float32: a few roundings more or less, where kernels sum in another order.
    assert distance(found, exact) < max(4 * eager, 1e-5)


def test_the_report_lists_the_islands_and_a_stored_schedule_has_them(folder, monkeypatch):
    monkeypatch.setenv("PLAIT_CACHE", str(folder))
    torch._dynamo.reset()
    model, tokens = model_and_tokens()

    first, second = (plait.jit(Step0(model), level="O1") for _ in range(2))
    values = [gradients(run, model, tokens) for run in (first, second)]
    assert all(x.equal(y) for x, y in zip(*values, strict=True))
    assert second.report().from_cache
    for report in (first.report(), second.report()):
        assert "islands" in str(report)
        assert any("compiled, in" in line for line in report.islands)
        assert report.to_json()["islands"]


class Step0(nn.Module):
    """A model with its loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return loss_of(self.model, tokens)


def test_each_distinct_island_is_compiled_once_however_many_layers_there_are():
    model, tokens = model_and_tokens()
    graph = plait.capture(model, tokens, loss=loss_of)
    schedule = plait.compile(graph, level="O1")
    counts = schedule.count_islands()
    assert set(counts) == set(schedule.islands)
    assert sum(counts.values()) > 2 * len(counts)  # three layers share theirs


def test_an_island_that_fails_to_compile_runs_as_o0_and_is_named(monkeypatch):
    model, tokens = model_and_tokens()
    graph = plait.capture(model, tokens, loss=loss_of)
    schedule, plain = plait.compile(graph, level="O1"), plait.compile(graph)
    good = plait.run(plain, model, tokens)
    name, island = next(iter(schedule.islands.items()))
    # An operand whose form is not what the operators take: Inductor cannot trace them.
    wrong = tuple(torch_value(v) for v in island.takes)
    schedule.islands[name] = IslandProgram(program=island.program, takes=wrong)
    found = compile_islands(schedule)
    assert list(found.refused) == [name]
    assert name in "\n".join(found.lines())
    value = plait.run(schedule, model, tokens)
    assert torch.allclose(value, good, rtol=1e-5)
    assert f"{name} runs as O0" in schedule.report()


def torch_value(value):
    from dataclasses import replace

    return replace(value, shape=(7, *value.shape), stride=(1, *value.stride))


BROKEN_COMPILERS = {
    "missing": None,
    "fails": "echo 'internal compiler error' >&2; exit 1",
    "writes nothing": "exit 0",
    "writes what is no library": """
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then echo nothing > "$2"; fi
  shift
done
""",
}


@pytest.mark.parametrize("does", BROKEN_COMPILERS.values(), ids=BROKEN_COMPILERS)
def test_without_a_compiler_that_works_o1_runs_o0s_kernels_with_one_warning(does, tmp_path):
    compiler, script = tmp_path / "g++", tmp_path / "script.py"
    if does is not None:
        version = 'if [ "$1" = --version ]; then echo "g++ (GCC) 12.2.0"; exit 0; fi'
        compiler.write_text(f"#!/bin/sh\n{version}\n{does}\n")
        compiler.chmod(0o755)
    script.write_text(
        "import json, warnings, torch, plait\n"
        "torch.manual_seed(0)\n"
        "layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))\n"
        "def f(x):\n"
        "    for layer in layers:\n"
        "        x = layer(x).sin().cos() + 1\n"
        "    return x.sum()\n"
        "x = torch.randn(4, 8)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    compiled = plait.jit(f, level='O1', cache=False)\n"
        "    same = bool(compiled(x) == f(x))\n"
        "ours = [str(w.message) for w in caught if 'CompilerWarning' in str(w.category)]\n"
        "print(json.dumps([same, ours, str(compiled.report())]))\n"
    )
    env = {"PATH": "", "CXX": str(compiler), "HOME": str(tmp_path)}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_VEC_ISA_OK": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    same, ours, report = json.loads(done.stdout.splitlines()[-1])
    assert same
    assert len(ours) == 1
    assert "Install g++" in ours[0]
    assert "runs as O0" in report


def test_a_program_of_unknown_size_runs_at_o1():
    torch._dynamo.reset()
    compiled = plait.jit(lambda x: (x.sin() + 1).cos().sum(-1), level="O1", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 4)
        assert torch.allclose(compiled(x), (x.sin() + 1).cos().sum(-1))


def test_an_island_frees_its_operands_as_it_runs():
    takes = plait.capture(nn.Linear(4, 4), torch.ones(4, 4)).inputs[-1:]
    steps = (
        Step(name="a", target="aten.sin.default", args=(Ref("x"),), frees=("x",)),
        Step(name="b", target="aten.cos.default", args=(Ref("a"),), frees=("a",)),
    )
    program = Program(name="island_test", inputs=("x",), results=(Ref("b"),), steps=steps)
    schedule = plait.compile(plait.capture(nn.Linear(4, 4), torch.ones(4, 4)))
    schedule.islands["island_test"] = IslandProgram(program=program, takes=takes)
    kernel = Runnable(schedule).islands.kernels["island_test"]
    box = [torch.ones(4, 4)]
    (result,) = kernel(box)
    assert box == []
    assert torch.allclose(result, torch.ones(4, 4).sin().cos())


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_the_losses_of_200_steps_cannot_be_told_from_those_of_o0(dtype):
    """The curves differ by no more than two O0 runs whose weights start one rounding apart."""
    curves = {}
    for name in ("O0", "O1", "O2", "nudged"):
        torch._dynamo.reset()
        model, _ = model_and_tokens()
        if name == "nudged":
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + torch.finfo(dtype).eps)
        run = plait.jit(
            lambda x, model=model: loss_of(model, x),
            level="O0" if name == "nudged" else name,
            cache=False,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        curve = []
        for _ in range(200):
            tokens = torch.randint(0, 96, (2, 33), generator=generator)
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                value = run(tokens)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            curve.append(value.item())
        curves[name] = torch.tensor(curve, dtype=torch.float64)
    largest = (curves["nudged"] - curves["O0"]).abs().max()
    for level in ("O1", "O2"):
        assert (curves[level] - curves["O0"]).abs().max() <= 4 * largest + 1e-7


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_a_model_that_is_strict_itself_stays_so_at_every_level(level):
    config = DecoderConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_size=32,
        max_positions=64,
    )
    torch.manual_seed(0)
    model = Decoder(replace(config, numerics="strict"))
    model.initialize()
    tokens = torch.randint(0, 96, (3, 40))
    whole = plait.jit(model, level=level, cache=False)
    expected = model(tokens)
    assert torch.equal(whole(tokens), expected)
    assert torch.equal(whole(tokens[1:2]), expected[1:2])
    assert "strict numerics" in str(whole.report())
    options = {"level": level, "replicas": [2, 3]}  # of a model that is not spread they say nothing
    assert torch.equal(torch.compile(model, backend="plait", options=options)(tokens), expected)
