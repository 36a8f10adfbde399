"""The loss without logits: put in only where it is the same loss, and close to float64."""

import pytest
import torch
from torch import nn

import plait
from plait.compiler.fuse_loss import fuse_loss
from plait.graph.verify import verify
from plait.ops import linear_cross_entropy as module

VOCABULARY, WIDTH, ROWS = 256, 16, 96


class Head(nn.Module):
    """A hidden layer and the logits of a vocabulary."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=dtype)

    def forward(self, x):
        return self.head(self.inner(x).tanh())


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    targets[::7] = -100
    return x, targets


def loss(reduction="mean", **settings):
    def of(model, x, targets):
        return nn.functional.cross_entropy(model(x), targets, reduction=reduction, **settings)

    return of


def holds(schedule, operator):
    programs = (*schedule.programs.values(), *schedule.templates.values())
    return any(operator in step.target for program in programs for step in program.steps)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_are_as_close_to_float64_as_eager(reduction):
    exact_model, (x, targets) = Head(torch.float64), batch(torch.float64)
    exact_model.load_state_dict(Head().state_dict())
    exact = loss(reduction)(exact_model, x, targets)
    exact.backward()
    model, (x, targets) = Head(), batch()
    graph = fuse_loss(plait.capture(model, x, targets, loss=loss(reduction)))
    verify(graph)
    schedule = plait.compile(graph)
    assert holds(schedule, "linear_cross_entropy")
    assert not holds(schedule, "_log_softmax")
    value = plait.run(schedule, model, x, targets)
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    for p, q in zip(model.parameters(), exact_model.parameters(), strict=True):
        # Float32 sums over 96 rows and 256 classes.
        assert ((p.grad - q.grad).norm() / q.grad.norm()).item() < 1e-5


@pytest.mark.parametrize(
    ("of", "reason"),
    [
        (lambda m, x, t: loss("none")(m, x, t).square().mean(), "keeps every row's loss"),
        (loss(ignore_index=3), "leaves out a class that exists"),
        (
            lambda m, x, t: (y := m(x)).square().mean() + nn.functional.cross_entropy(y, t),
            "other uses",
        ),
    ],
    ids=["every_row", "ignore_index", "logits_used_twice"],
)
def test_another_loss_is_left_as_it_is_and_a_note_says_why(of, reason):
    model, (x, targets) = Head(), batch()
    targets = targets.clamp(min=0)
    graph = fuse_loss(plait.capture(model, x, targets, loss=of))
    assert reason in str(graph.notes[0])
    assert not holds(plait.compile(graph), "linear_cross_entropy")


def test_of_logits_that_are_kept_the_weight_gets_its_gradient_in_the_backward():
    exact_model, (x, targets) = Head(torch.float64), batch(torch.float64)
    exact_model.load_state_dict(Head().state_dict())
    loss()(exact_model, x[:4], targets[:4]).backward()
    model, (x, targets) = Head(), batch()
    graph = fuse_loss(plait.capture(model, x[:4], targets[:4], loss=loss()))
    verify(graph)
    schedule = plait.compile(graph)
    assert holds(schedule, "linear_cross_entropy")
    assert not holds(schedule, "_log_softmax")
    saved = [value.shape for t in graph.templates.values() for value in t.computed_saved]
    assert (4, VOCABULARY) in saved
    assert (VOCABULARY, WIDTH) not in saved
    plait.run(schedule, model, x[:4], targets[:4])
    for p, q in zip(model.parameters(), exact_model.parameters(), strict=True):
        # Float32 sums over 4 rows and 256 classes.
        assert ((p.grad - q.grad).norm() / q.grad.norm()).item() < 1e-5


def test_a_loss_whose_gradients_are_larger_than_its_logits_is_left(monkeypatch):
    monkeypatch.setattr(module, "GROUP_ELEMENTS", 3 * VOCABULARY)  # so few may be kept
    model, (x, targets) = Head(), batch()
    graph = fuse_loss(plait.capture(model, x[:4], targets[:4], loss=loss()))
    assert "larger than the logits" in str(graph.notes[0])
