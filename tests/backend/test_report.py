"""The report of a compiled function: each break once, at the user's line, in plain words."""

import json
import logging
import random
import time
import warnings

import pytest
import torch

import plait
from plait.backend.report import ONE_LINE, collecting_reports
from plait.graph.breaks import explain_break, explain_guard, short_path

log = logging.getLogger(__name__)


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@torch.compiler.disable
def not_compiled(x):
    return x + 1


@pytest.fixture(scope="module")
def operator_without_a_fake():
    library = torch.library.Library("plait_report_test", "DEF")
    library.define("copy(Tensor x) -> Tensor")
    library.impl("copy", lambda x: x.clone(), "CPU")
    yield
    library._destroy()


def prints(x):
    y = x + 1
    print("text")  # noqa: T201
    return y * 2


def reads_a_value(x):
    y = x + 1
    return y * y.sum().item()


def reads_a_truth(x):
    flag = bool((x > 0).all())
    return x * 2 if flag else x


def decides(x):
    if x.sum() > 0:
        return x * 2
    return x * 3


def selects(x):
    y = x + 1
    return y[y > 0].sum()


def finds(x):
    return (x + 1).nonzero().sum()


def calls_a_custom_operator(x):
    return torch.ops.plait_report_test.copy(x + 1) * 2


def calls_what_is_not_compiled(x):
    return not_compiled(x * 2) * 2


def asks_for_a_break(x):
    y = x + 1
    torch._dynamo.graph_break()
    return y * 2


def reads_the_clock(x):
    y = x + 1
    return y * time.time()


def logs(x):
    y = x + 1
    log.warning("text")
    return y * 2


def warns(x):
    y = x + 1
    warnings.warn("text", UserWarning, stacklevel=1)
    return y * 2


def draws(x):
    y = x + 1
    return y * random.random()


def seeds(x):
    y = x + 1
    torch.manual_seed(0)
    return y * 2


optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)


def forgets_gradients(x):
    y = x + 1
    optimizer.zero_grad()
    return y * 2


def encodes(x):
    y = x + 1
    json.dumps({"a": 1})
    return y * 2


def opens(x):
    y = x + 1
    with open(__file__) as file:  # noqa: PTH123
        file.read(1)
    return y * 2


def catches(x):
    y = x + 1
    try:
        print("text")  # noqa: T201
        y = y * 2
    except ValueError:
        pass
    return y


BREAKS = {
    prints: ("text is printed", 'print("text")'),
    reads_a_value: ("value is read into Python", "y.sum().item()"),
    reads_a_truth: ("value is read into Python", "bool((x > 0).all())"),
    decides: ("Python decides by the value", "if x.sum() > 0:"),
    selects: ("shape of the result depends", "y[y > 0]"),
    finds: ("shape of the result depends", ".nonzero()"),
    calls_a_custom_operator: ("custom operator does not say", "plait_report_test.copy"),
    calls_what_is_not_compiled: ("marked not to be compiled", "not_compiled(x * 2)"),
    asks_for_a_break: ("asks for a break", "graph_break()"),
    reads_the_clock: ("clock is read with time.time", "time.time()"),
    logs: ("message is logged", "log.warning"),
    warns: ("a warning is given", "warnings.warn"),
    draws: ("random numbers of Python", "random.random()"),
    seeds: ("random generator is seeded", "torch.manual_seed(0)"),
    forgets_gradients: ("`Optimizer.zero_grad` is called", "optimizer.zero_grad()"),
    encodes: ("the method __new__ of type is called", "json.dumps"),
    opens: ("a file is read or written", "open(__file__)"),
    catches: ("text is printed, and `catches` cannot go on", 'print("text")'),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("operator_without_a_fake")
@pytest.mark.parametrize("function", BREAKS, ids=lambda function: function.__name__)
def test_a_break_names_the_line_the_reason_and_a_way_round(function):
    compiled = plait.jit(function, cache=False)
    compiled(torch.ones(3, 4))
    (found,) = compiled.report().breaks
    plain, code = BREAKS[function]
    path, _, line = found.where.rpartition(":")
    assert path == __file__
    assert code in open(path).readlines()[int(line) - 1]  # noqa: PTH123, SIM115
    assert plain in found.reason
    assert found.advice
    assert "Dynamo " not in found.reason.replace("TorchDynamo", "")


def two_breaks(x):
    y = x + 1
    value = y.sum().item()
    if value > 0:
        print(f"{value:.1f}")  # noqa: T201
    return y * 2


def test_a_line_is_listed_once_however_often_it_breaks():
    compiled = plait.jit(two_breaks, cache=False)
    for size in (3, 4, 5):
        compiled(torch.ones(size))
    report = compiled.report()
    assert len(report.breaks) == 2
    assert len({each.where for each in report.breaks}) == 2
    assert "step_unsupported" not in str(report)
    assert "2 graph breaks" in str(report)
    assert max(report.times.values()) >= 2


def test_places_are_short_and_resumed_functions_keep_their_name():
    compiled = plait.jit(two_breaks, cache=False)
    compiled(torch.ones(3))
    text = str(compiled.report())
    assert f"{short_path(__file__)}:" in text
    assert "torch_dynamo_resume" not in text
    assert "two_breaks after line" in text
    assert text.startswith("two_breaks: ")


def test_a_recompilation_says_what_differed():
    compiled = plait.jit(lambda x, n: x * n, cache=False, dynamic=False)
    compiled(torch.ones(3), 2)
    compiled(torch.ones(4), 2)
    compiled(torch.ones(4).double(), 2)
    compiled(torch.ones(4, 1).double(), 2)
    compiled(torch.ones(4, 1).double(), 3)
    assert compiled.report().recompilations[:3] == [
        "dim 0 of x has size 4, and had 3",
        "x is of dtype float64, and was float32",
        "x has 2 dims, and had 1",
    ]
    assert compiled.report().recompilations[3].startswith("n is not 2 any more")
    assert "4 recompilations" in str(compiled.report())


GUARDS = {
    "0/0: len(L['xs']) == 3": "the length of xs is not 3 any more",
    "0/0: len(L['self'].blocks._modules) != 3": "the length of self.blocks is 3 now",
    "0/0: L['model']._modules['0']._parameters['weight'].grad is None": (
        "model.0.weight.grad is not None any more"
    ),
    "0/1: tensor 'x' requires_grad mismatch. expected requires_grad=0": (
        "requires_grad of x changed"
    ),
    "GLOBAL_STATE changed: grad_mode ": "the mode grad_mode changed",
    "not L['flag']": "flag is not false or zero any more",
    "0/0: ___stack0 == 1.5  # if v > 1:  # a/b.py:35 in f": (
        "a value computed before is not 1.5 any more (b.py:35: `if v > 1:`)"
    ),
    "0/0: something new": "something new",
    "": "no reason was given",
}


@pytest.mark.parametrize("reason", GUARDS)
def test_a_failed_guard_is_told_in_plain_words(reason):
    assert explain_guard(reason) == GUARDS[reason]


def test_an_unknown_reason_keeps_its_explanation_and_hint():
    reason = "Something new\n  Explanation: The moon is full.\n  Hint: Wait a day.\n"
    assert explain_break(reason) == ("The moon is full", "Wait a day")


def test_reports_of_both_forms_are_collected_with_their_own_breaks():
    with collecting_reports() as reports:
        ours = plait.jit(prints)
        theirs = torch.compile(decides, backend="plait")
        ours(torch.ones(3))
        theirs(torch.ones(3))
    by_name = {report.name: report for report in reports}
    assert by_name["prints"] is ours.report()
    assert [each.reason[:15] for each in ours.report().breaks] == ["text is printed"]
    assert by_name["prints"].kept
    one_line = by_name.get(ONE_LINE)
    if one_line is not None:  # made here, unless a test before asked for the same backend
        assert [each.reason[:14] for each in one_line.breaks] == ["Python decides"]


def test_the_report_as_json_holds_everything_that_is_printed():
    compiled = plait.jit(two_breaks, cache=False)
    compiled(torch.ones(3))
    found = json.loads(json.dumps(compiled.report().to_json()))
    assert found["name"] == "two_breaks"
    assert [each["times"] for each in found["breaks"]] == [1, 1]
    assert found["num_guards"] > 0
    assert set(found["phases_s"]) == {"read", "trace", "generate"}
    assert sum(graph["num_operators"] for graph in found["graphs"]) > 0


class Passing(torch.nn.Module):
    """A layer that returns what it was given beside what it made."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.linear(x)), x


class Stack(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Passing() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            made, given = layer(x)
            x = made + given
        return x


FLAT = "a layer returns what it was given, or one tensor twice; to avoid it: let it return new"


def test_blocks_that_cannot_be_shared_are_named_with_the_reason():
    model, x = Stack(), torch.randn(2, 4)
    compiled = plait.jit(model, cache=False)
    assert torch.equal(compiled(x), model(x))
    assert compiled.report().flat_blocks["Passing"].startswith(FLAT)
    assert f"repeated blocks captured one by one:\n  Passing: {FLAT}" in str(compiled.report())
    schedule = plait.compile(plait.capture(model, x))
    assert f"capture: left Passing (root): each captured by itself: {FLAT}" in schedule.report()


def test_a_graph_that_is_captured_as_a_whole_is_named_with_the_reason():
    layers = (torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(3))
    model, x = torch.nn.Sequential(*layers), torch.randn(3, 4)
    compiled = plait.jit(model, dynamic=True, cache=False)
    assert torch.equal(compiled(x), model(x))
    assert set(compiled.report().whole_graphs.values()) == {"its shapes are dynamic"}
    assert "as a whole, without templates:\n  a graph of library code: its" in str(
        compiled.report()
    )
