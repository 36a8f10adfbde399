"""Level O2: a program is one island where its order is free, and has islands where it is not."""

import pytest
import torch
from torch import nn

import plait
from plait.graph.storage import from_json, to_json
from plait.graph.verify_schedule import verify_schedule
from tests.compiler.replica_models import Case
from tests.compiler.test_tokens import pytestmark as warnings_of_capture
from tests.graph.spread_models import loss

pytestmark = [
    *(warnings_of_capture if isinstance(warnings_of_capture, list) else [warnings_of_capture]),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


class Mlp(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        for layer in self.layers:
            x = x + self.dropout(layer(x).sin())
        return x


def mean_square(model, x):
    return model(x).square().mean()


def islands_of(schedule):
    return {name: [s.target for s in p.steps] for name, p in schedule.programs.items()}


def test_forward_and_backward_are_one_island_each_and_compute_the_same():
    model, x = Mlp(), torch.randn(4, 8)
    graph = plait.capture(model, x, loss=mean_square)
    schedule = from_json(to_json(plait.compile(graph, level="O2")))
    verify_schedule(schedule)
    assert {island.mode for island in schedule.islands.values()} == {"max-autotune"}
    for targets in islands_of(schedule).values():
        assert sum(target.startswith("island:") for target in targets) == 1
        assert all(target.startswith(("island:", "getitem")) for target in targets)
    value = plait.run(schedule, model, x)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = mean_square(model, x)
    expected.backward()
    assert torch.allclose(value, expected)
    for gradient, p in zip(found, model.parameters(), strict=True):
        assert torch.allclose(gradient, p.grad, rtol=1e-4, atol=1e-6)


def test_random_draws_keep_their_order_and_the_report_says_so():
    graph = plait.capture(Mlp(dropout=0.5), torch.randn(4, 8), loss=mean_square)
    schedule = plait.compile(graph, level="O2")
    assert not any(island.mode for island in schedule.islands.values())
    assert "random draws keep their order" in schedule.report()


def test_collectives_keep_their_order_and_the_report_says_so():
    case = Case("our_llama", sp=True, replicas=2, numerics="fast")
    graph = plait.capture(case.model(), case.tokens(), case.plan(), loss=loss)
    schedule = plait.compile(graph, case.plan(), level="O2")
    assert "collectives keep their order" in schedule.report()
    assert schedule.islands
    assert not any(island.mode for island in schedule.islands.values())


def test_a_split_backward_runs_at_o1_and_the_report_says_so():
    plan = plait.ParallelPlan(split_backward=True)
    graph = plait.capture(Mlp(), torch.randn(4, 8), loss=mean_square)
    schedule = plait.compile(graph, plan, level="O2")
    assert "backward_weight" in schedule.programs
    assert "split backward" in schedule.report()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU for a CUDA graph")
def test_a_step_on_a_gpu_is_replayed_and_sees_changed_parameters():
    model, x = Mlp().cuda(), torch.randn(4, 8, device="cuda")
    schedule = plait.compile(plait.capture(model, x, loss=mean_square), level="O2")
    for _ in range(3):
        model.zero_grad()
        value = plait.run(schedule, model, x)
        assert torch.allclose(value, mean_square(model, x), rtol=1e-4)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert schedule.loaded.replay is not None
