"""Each fusion of level O1 by itself: one island each way, and its stated distance from float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import plait
from plait.compiler.levels import ISLANDS, LOSS
from plait.executor.run import Runnable

# Inductor's own modules, where this is the first test that imports them.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
M, W, V = 96, 64, 512
MOVES = {"t", "permute", "view", "transpose", "expand", "detach"}


def add_rms_norm(x, residual, weight):
    total = x + residual
    wide = total.float() if total.dtype is torch.bfloat16 else total
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return weight * normed.to(x.dtype) + total


def layer_norm(x, residual, weight):
    return functional.layer_norm(x + residual, (W,), weight)


def rotary(x, angles, weight):
    first, second = (x * weight).chunk(2, -1)
    return x * angles.cos() + torch.cat((-second, first), -1) * angles.sin()


def swiglu(gate, up, weight):
    return functional.silu(gate) * up * weight


def geglu(gate, up, weight):
    return functional.gelu(gate, approximate="tanh") * up * weight


FUSIONS = {f.__name__: f for f in (add_rms_norm, layer_norm, rotary, swiglu, geglu)}


class Program(nn.Module):
    """A fusion between two products, as in a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.before, self.beside = (nn.Linear(W, W, bias=False) for _ in range(2))
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(W))

    def forward(self, x):
        return self.function(self.before(x), self.beside(x), self.weight)


def loss_of(model, x, probe):
    return (model(x) * probe).sum()


def distances(found, exact, dtype):
    """Of each tensor, in units of the dtype's spacing at 1, relative to its largest value."""
    eps = torch.finfo(dtype).eps
    return [
        ((x.double() - y).abs().max() / y.abs().max() / eps).item()
        for x, y in zip(found, exact, strict=True)
    ]


def gradients(model):
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def targets_of(schedule):
    programs = [*schedule.programs.values(), *schedule.templates.values()]
    return [each.target for program in programs for each in program.steps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUSIONS)
def test_a_fusion_is_one_island_each_way_and_keeps_its_tolerance(name, dtype):
    torch.manual_seed(0)
    model = Program(FUSIONS[name]).to(dtype)
    x, probe = (torch.randn(M, W).to(dtype) for _ in range(2))
    graph = plait.capture(model, x, probe, loss=loss_of)
    schedule = plait.compile(graph, level="O1")
    assert sorted(Runnable(schedule).islands.kernels) == sorted(schedule.islands)
    names = targets_of(schedule)
    assert sum(name.startswith("island:") for name in names) == 2, names
    computing = {name.split(".")[1] for name in names if name.startswith("aten.")}
    assert computing - MOVES == {"mm"}, names
    plait.run(schedule, model, x, probe)
    found = gradients(model)
    exact = model.double()
    loss_of(exact, x.double(), probe.double()).backward()
    assert max(distances(found, gradients(exact), dtype)) <= ISLANDS.tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_without_logits_keeps_its_tolerance(dtype):
    torch.manual_seed(0)
    model = nn.Linear(W, V, bias=False).to(dtype)
    x, targets = torch.randn(M, W).to(dtype), torch.randint(0, V, (M,))

    def loss(model, x, targets):
        logits = model(x)
        wide = logits.float() if dtype is torch.bfloat16 else logits
        return functional.cross_entropy(wide, targets, reduction="sum")

    schedule = plait.compile(plait.capture(model, x, targets, loss=loss), level="O1")
    assert any("linear_cross_entropy" in name for name in targets_of(schedule))
    value = plait.run(schedule, model, x, targets)
    found = [value.detach(), *gradients(model)]
    exact = model.double()
    wanted = functional.cross_entropy(exact(x.double()), targets, reduction="sum")
    wanted.backward()
    assert max(distances(found, [wanted, *gradients(exact)], dtype)) <= LOSS.tolerance
