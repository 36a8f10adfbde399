"""plait.capture refuses what its graph would not do, and says what and where."""

import functools
import logging
import sys

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import plait
from plait.errors import GraphError

HERE = r"\S*test_capture_refusals\.py:\d+"
seen = []
count = 0


def scalar(model, x):
    return model(x).square().mean()


def appends_to_a_global(model, x):
    value = scalar(model, x)
    seen.append(value.detach())
    return value


def counts_a_global(model, x):
    global count
    count += 1
    return scalar(model, x)


class Watching(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Noting(nn.Module):
    """Changes something of itself, as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.how, self.count, self.known, self.list = how, 0, {}, []
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        y = self.linear(x)
        if self.how == "a number":
            self.count += 1
            return y * self.count
        if self.how == "a tensor":
            self.last = y
        if self.how == "a dict":
            self.known["y"] = y
        if self.how == "a list":
            self.list.append(y)
        if self.how == "a buffer is replaced":
            self.mean = self.mean + y.mean(0)
        if self.how == "a mode":
            self.eval()
        if self.how == "a gradient's hook":
            self.linear.weight.register_hook(lambda g: 2 * g)
        if self.how == "the same number":
            self.count = 0
        if self.how == "a buffer in place":
            self.mean.add_(y.detach().mean(0))
        if self.how == "a local list":
            parts = []
            parts.append(y)
            (y,) = parts
        if self.how == "a mode for a while":
            with Watching():
                y = y + torch.ones(4)
        if self.how == "a property kept":
            y = y * self.scale
        return y

    @functools.cached_property
    def scale(self):
        return 2.0


@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("a number", r"model\.count"),
        ("a tensor", r"model\.last"),
        ("a dict", r"model\.known, a dict"),
        ("a list", r"model\.list, a list"),
        ("a buffer is replaced", r"a buffer of model"),
        ("a mode", r"model\.training"),
    ],
)
@pytest.mark.parametrize("loss", [None, scalar])
def test_a_change_of_the_model_is_refused_by_name_and_line(how, what, loss):
    with pytest.raises(GraphError, match=rf"changes {what} \({HERE}"):
        plait.capture(Noting(how), torch.randn(2, 4), loss=loss)


def test_a_change_inside_of_a_repeated_layer_is_refused():
    model = nn.Sequential(*(Noting("a number") for _ in range(3)))
    with pytest.raises(GraphError, match=rf"model\.0\.count \({HERE}: `self\.count \+= 1`"):
        plait.capture(model, torch.randn(2, 4))


def test_a_hook_that_the_program_registers_is_refused():
    with pytest.raises(GraphError, match=r"the hooks of model\.linear\.weight"):
        plait.capture(Noting("a gradient's hook"), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("loss", "what"), [(appends_to_a_global, "seen, a list"), (counts_a_global, "count")]
)
def test_a_loss_that_changes_a_global_is_refused(loss, what):
    with pytest.raises(GraphError, match=rf"changes {what} \({HERE}"):
        plait.capture(nn.Linear(4, 4), torch.randn(2, 4), loss=loss)
    assert (seen, count) == ([], 0)


def test_a_loss_that_changes_what_stands_around_it_is_refused():
    values, num_calls = [], 0

    def loss(model, x):
        nonlocal num_calls
        num_calls += 1
        values.append(1)
        return scalar(model, x)

    with pytest.raises(GraphError, match="num_calls ") as caught:
        plait.capture(nn.Linear(4, 4), torch.randn(2, 4), loss=loss)
    assert "values, a list" in str(caught.value)
    assert (values, num_calls) == ([], 0)


@pytest.mark.parametrize(
    "how",
    [
        "the same number",
        "a buffer in place",
        "a local list",
        "a mode for a while",
        pytest.param(
            "a property kept",
            marks=pytest.mark.skipif(
                sys.version_info < (3, 12), reason="functools takes a lock, which no graph has"
            ),
        ),
    ],
)
def test_what_a_graph_does_keep_is_captured(how):
    torch.manual_seed(0)
    model, x = Noting(how), torch.randn(2, 4)
    schedule = plait.compile(plait.capture(model, x))
    found, mean = plait.run(schedule, model, x), model.mean.clone()
    model.mean.zero_()
    assert torch.equal(found, model(x))
    assert torch.equal(mean, model.mean)


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda m, x: m(x), r"a tensor of shape \(2, 4\)"),
        (lambda m, x: (m(x).sum(), m(x)), "a tuple"),
        (lambda m, x: (m(x).sum(),), "a tuple"),
        (lambda m, x: {"loss": m(x).sum()}, "a dict"),
        (lambda m, x: None, "None"),
        (lambda m, x: 1.5, "a float"),
    ],
    ids=["matrix", "pair", "tuple-of-one", "dict", "nothing", "number"],
)
def test_a_loss_that_is_no_scalar_is_refused_with_what_it_returned(loss, what):
    with pytest.raises(GraphError, match=f"returned {what}"):
        plait.capture(nn.Linear(4, 4), torch.randn(2, 4), loss=loss)


def test_a_loss_of_one_element_is_a_scalar_too():
    model, x = nn.Linear(4, 1), torch.randn(1, 4)
    graph = plait.capture(model, x, loss=lambda m, x: m(x))
    assert plait.run(plait.compile(graph), model, x).shape == (1, 1)
    assert torch.equal(model.weight.grad, x)


def test_a_function_is_refused_with_what_takes_functions():
    with pytest.raises(GraphError, match=r"torch\.nn\.Module.*plait\.jit"):
        plait.capture(scalar, torch.randn(2, 4))


@pytest.mark.parametrize(
    ("loss", "whose"), [(None, r"Linear\.forward"), (scalar, "the loss scalar")]
)
def test_an_input_that_is_missing_is_named(loss, whose):
    name = "input" if loss is None else "x"
    with pytest.raises(GraphError, match=f"{whose}.*missing a required argument: '{name}'"):
        plait.capture(nn.Linear(4, 4), loss=loss)


def test_an_input_too_many_is_refused():
    with pytest.raises(GraphError, match="too many positional arguments"):
        plait.capture(nn.Linear(4, 4), torch.randn(2, 4), torch.randn(2, 4))


def test_a_loss_that_cannot_be_called_is_refused():
    with pytest.raises(GraphError, match="loss"):
        plait.capture(nn.Linear(4, 4), torch.randn(2, 4), loss="mse")


def test_a_shape_that_does_not_fit_is_said_once_at_the_users_line(caplog):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x[:, :3])

    with pytest.raises(GraphError, match=rf"{HERE}") as caught:
        plait.capture(Model(), torch.randn(2, 4))
    assert r"[2, 3] X [4, 4]" in str(caught.value)
    assert "self.linear(x[:, :3])" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert [each for each in caplog.records if each.levelno >= logging.WARNING] == []


def test_an_error_that_the_program_raises_is_told():
    class Model(nn.Module):
        def forward(self, x):
            raise RuntimeError("three columns are needed")

    with pytest.raises(GraphError, match=rf"three columns are needed.*{HERE}|{HERE}.*three"):
        plait.capture(Model(), torch.randn(2, 4))
