"""What cannot be captured is said with its line; what is misspelt, with what is known."""

import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

import plait
from plait.errors import ConfigError, GraphError


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.library.custom_op("plait_tests::no_fake", mutates_args=())
def no_fake(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_a_graph_is_named_by_the_users_line():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.inner(x).tanh()

    compiled = plait.jit(nn.Sequential(Layer(), Layer()))
    compiled(torch.randn(2, 4))
    (graph,) = compiled.report().graphs
    assert "test_bad_input.py" in graph.where


def test_the_first_results_are_not_kept_alive(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    model = nn.Linear(4, 4)
    compiled = plait.jit(model)
    result = weakref.ref(compiled(torch.randn(2, 4)))
    assert list(tmp_path.glob("*.json"))
    gc.collect()
    assert result() is None


def test_an_operator_without_a_fake_ends_the_graph_and_is_named():
    def program(x):
        return no_fake(x.sin()).cos()

    compiled = plait.jit(program)
    x = torch.randn(3)
    assert torch.equal(compiled(x), program(x))
    (found,) = compiled.report().breaks
    assert "test_bad_input.py" in found.where
    assert "register_fake" in found.advice


def test_capture_refuses_an_operator_without_a_fake():
    class Model(nn.Module):
        def forward(self, x):
            return no_fake(x)

    with pytest.raises(GraphError, match="not one graph"):
        plait.capture(Model(), torch.randn(3))


def test_capture_refuses_a_side_effect_with_its_line():
    class Model(nn.Module):
        def forward(self, x):
            print("now")  # noqa: T201 (the side effect under test)
            return x.sin()

    with pytest.raises(GraphError, match=r"test_bad_input\.py:\d+"):
        plait.capture(Model(), torch.randn(3))


def test_an_unknown_option_names_those_there_are():
    compiled = torch.compile(lambda x: x.sin(), backend="plait", options={"levl": "O0"})
    with pytest.raises(Exception, match="Did you mean 'level'") as caught:
        compiled(torch.randn(3))
    assert isinstance(caught.value, ConfigError) or "ConfigError" in str(caught.value)


def test_a_mode_of_inductor_is_refused_with_what_plait_has():
    compiled = torch.compile(lambda x: x.sin(), backend="plait", mode="reduce-overhead")
    with pytest.raises(
        Exception, match=r"mode='reduce-overhead' is Inductor's.*\"level\""
    ) as caught:
        compiled(torch.randn(3))
    assert isinstance(caught.value, ConfigError) or "ConfigError" in str(caught.value)


def test_jit_takes_functions_and_modules_only():
    with pytest.raises(ConfigError, match="function or module"):
        plait.jit(3)


def test_level_0_needs_no_compiler(tmp_path):
    program = (
        "import torch, plait\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())\n"
        "x = torch.randn(2, 4)\n"
        "compiled = plait.jit(model, cache=False)\n"
        "compiled(x).sum().backward()\n"
        "print(torch.equal(compiled(x), model(x)))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PATH": str(tmp_path), "CXX": "/nowhere/c++", "CC": "/nowhere/cc"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("level", ["O0", "O1"])
def test_a_gradient_penalty_is_refused_and_not_left_out(level):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.randn(4, 8, requires_grad=True)
    value = plait.jit(model, level=level, cache=False)(x).sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.allclose(gradient, expected)
    with pytest.raises(GraphError, match="second derivative"):
        (value + gradient.pow(2).sum()).backward()


@pytest.mark.parametrize("depth", [1, 3])
def test_sizes_that_vary_from_the_start_may_meet_numbers_of_layers(depth):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.inner(self.norm(x))

    model = nn.Sequential(*(Layer() for _ in range(depth)))
    compiled = plait.jit(model, dynamic=True, cache=False)
    for rows in (3, 5, 7):
        x = torch.randn(rows, 8)
        assert torch.equal(compiled(x), model(x))
    assert compiled.report().num_graphs == 1
    assert not compiled.report().recompilations
