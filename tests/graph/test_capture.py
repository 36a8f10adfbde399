"""plait.capture: one graph of a model, with templates, that computes what eager does."""

import pytest
import torch
from torch import nn

import plait
from plait.compiler.recompute import recompute
from plait.errors import GraphError, PlanError
from plait.graph.graph import Role
from plait.graph.storage import from_json, to_json
from plait.graph.verify_schedule import verify_schedule
from plait.plan.parallel_plan import Recompute


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x, shift):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)))) + shift


class Stack(nn.Module):
    def __init__(self, num_layers: int = 4, width: int = 16):
        super().__init__()
        self.first = nn.Linear(8, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(num_layers))
        self.last = nn.Linear(width, 3)

    def forward(self, x):
        shift = x.mean(-1, keepdim=True)
        y = self.first(x)
        for layer in self.layers:
            y = layer(y, shift)
        return self.last(y)


def loss(model, x, target):
    return nn.functional.mse_loss(model(x), target)


@pytest.fixture
def step():
    torch.manual_seed(0)
    return Stack(), torch.randn(6, 8), torch.randn(6, 3)


def eager_gradients(model, x, target):
    model.zero_grad()
    value = loss(model, x, target)
    value.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return value.detach(), gradients


def test_each_kind_of_layer_is_traced_once(step):
    graph = plait.capture(step[0], *step[1:], loss=loss)
    layers = [each for each in graph.templates.values() if each.block == "Layer"]
    assert len(layers) == 1
    assert [v.name for v in graph.values(Role.PARAMETER)] == [
        v.name for v in graph.values(Role.GRADIENT)
    ]
    assert {v.name for v in graph.values(Role.PARAMETER)} == {
        n for n, _ in step[0].named_parameters()
    }


def test_capture_leaves_the_model_as_it_was(step):
    model, x, target = step
    before = {name: p.clone() for name, p in model.named_parameters()}
    plait.capture(model, x, target, loss=loss)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(model.layers[0])


def test_a_step_has_the_bits_of_eager(step):
    model, x, target = step
    expected, gradients = eager_gradients(model, x, target)
    schedule = plait.compile(plait.capture(model, x, target, loss=loss))
    assert torch.equal(plait.run(schedule, model, x, target), expected)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


def test_a_schedule_runs_on_another_model_of_its_shape(step):
    model, x, target = step
    schedule = plait.compile(plait.capture(model, x, target, loss=loss))
    torch.manual_seed(1)
    other = Stack()
    expected, gradients = eager_gradients(other, x, target)
    assert torch.equal(plait.run(schedule, other, x, target), expected)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in other.named_parameters())


@pytest.mark.parametrize("policy", ["none", "selective", "alternate", "full"])
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3])
def test_recompute_and_micro_batches_keep_the_bits(step, policy, num_micro_batches):
    model, x, target = step
    model.zero_grad()
    losses = []
    for part in range(num_micro_batches):
        rows = slice(part * 6 // num_micro_batches, (part + 1) * 6 // num_micro_batches)
        value = loss(model, x[rows], target[rows])
        losses.append(value.detach())
        (value * (1 / num_micro_batches)).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    plan = plait.ParallelPlan(recompute=policy, num_micro_batches=num_micro_batches)
    schedule = plait.compile(plait.capture(model, x, target, plan, loss=loss), plan)
    found = plait.run(schedule, model, x, target)
    assert torch.equal(found, torch.stack(losses).mean())
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("policy", ["none", "full"])
def test_a_split_backward_keeps_the_bits(step, policy):
    model, x, target = step
    expected, gradients = eager_gradients(model, x, target)
    plan = plait.ParallelPlan(split_backward=True, recompute=policy)
    schedule = plait.compile(plait.capture(model, x, target, plan, loss=loss), plan)
    assert list(schedule.programs) == ["forward", "backward_input", "backward_weight"]
    verify_schedule(schedule)
    stored = from_json(to_json(schedule))
    assert torch.equal(plait.run(stored, model, x, target), expected)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


def test_the_first_program_of_a_split_backward_multiplies_for_activations_only(step):
    model, x, target = step
    plan = plait.ParallelPlan(split_backward=True)
    schedule = plait.compile(plait.capture(model, x, target, loss=loss), plan)

    def num_products(name):
        steps = [
            inner
            for step in schedule.programs[name].steps
            if step.target.startswith("call:")
            for inner in schedule.program(step.target.removeprefix("call:")).steps
        ]
        return sum(step.target == "aten.mm.default" for step in steps)

    # Two products a layer and one at the end; the input of the model needs no gradient.
    assert num_products("backward_input") == 2 * len(model.layers) + 1
    assert num_products("backward_weight") == 2 * len(model.layers) + 2


def test_more_recomputation_saves_less(step):
    model, x, target = step

    def saved_bytes(policy):
        plan = plait.ParallelPlan(recompute=policy)
        schedule = plait.compile(plait.capture(model, x, target, loss=loss), plan)
        return sum(value.num_bytes for value in schedule.saved if value.role is Role.SAVED)

    assert saved_bytes("none") > saved_bytes("selective") > saved_bytes("full")


def test_selective_recompute_weighs_cost_against_bytes():
    """A norm, a sum of rows, a product: the norm is cheap to make again, the others are kept."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)

        def forward(self, x):
            return x + self.linear(torch.sin(self.norm(x)) * x.square().mean(-1, keepdim=True))

    model = nn.Sequential(Block(), Block(), Block())
    graph = plait.capture(model, torch.randn(64, 32), loss=lambda m, x: m(x).square().sum())
    recomputed = recompute(graph, Recompute.SELECTIVE).templates
    again = {
        str(node.target)
        for template in recomputed.values()
        if template.block == "Block" and template.backward is not None
        for node in template.backward.graph.nodes
    }
    assert "aten.native_layer_norm.default" in again
    assert "aten.sin.default" in again
    assert not {"aten.addmm.default", "aten.mean.dim"} & again


def test_dropout_draws_what_eager_draws_also_when_recomputed():
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(3))
    x = torch.randn(5, 8)

    def run_all(model, x):
        for layer in model:
            x = layer(x)
        return x.square().sum()

    torch.manual_seed(1)
    expected = run_all(model, x)
    expected.backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    plan = plait.ParallelPlan(recompute="full")
    schedule = plait.compile(plait.capture(model, x, loss=run_all), plan)
    torch.manual_seed(1)
    assert torch.equal(plait.run(schedule, model, x), expected)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_without_a_loss_the_results_carry_gradients(step):
    model, x, _ = step
    schedule = plait.compile(plait.capture(model, x))
    expected = model(x)
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found = plait.run(schedule, model, x)
    found.square().sum().backward()
    assert torch.equal(found, expected)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


def test_without_gradients_there_is_a_forward_only(step):
    model, x, _ = step
    with torch.no_grad():
        schedule = plait.compile(plait.capture(model, x))
        assert list(schedule.programs) == ["forward"]
        assert torch.equal(plait.run(schedule, model, x), model(x))


def test_running_statistics_change_as_in_eager():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    other = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))
    other.load_state_dict(model.state_dict())
    x, target = torch.randn(6, 4), torch.randn(6, 2)
    expected, gradients = eager_gradients(model, x, target)
    schedule = plait.compile(plait.capture(other, x, target, loss=loss))
    assert torch.equal(plait.run(schedule, other, x, target), expected)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in other.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_a_model_larger_than_memory_is_captured():
    with torch.device("meta"):
        model = Stack(num_layers=3, width=200_000)
        x, target = torch.empty(2, 8), torch.empty(2, 3)
    graph = plait.capture(model, x, target, loss=loss)
    assert sum(value.num_bytes for value in graph.values(Role.PARAMETER)) > 900e9


def test_a_tied_weight_gets_the_sum_that_eager_computes():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.layers = nn.ModuleList(Layer(8) for _ in range(3))

        def forward(self, tokens):
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x, 0.5)
            return x @ self.embed.weight.T

    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 11, (3, 7))
    target = torch.randn(3, 7, 11)
    expected, gradients = eager_gradients(model, tokens, target)
    schedule = plait.compile(plait.capture(model, tokens, target, loss=loss))
    assert torch.equal(plait.run(schedule, model, tokens, target), expected)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


def test_a_tied_weight_is_summed_in_order_when_the_backward_is_split():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer(8) for _ in range(3))
            self.shift = nn.Parameter(torch.randn(8))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x, self.shift * x)
            return x * self.shift

    torch.manual_seed(0)
    model, x, target = Shared(), torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    expected, gradients = eager_gradients(model, x, target)
    inner, x.grad = x.grad, None
    plan = plait.ParallelPlan(split_backward=True)
    schedule = plait.compile(plait.capture(model, x, target, loss=loss), plan)
    assert torch.equal(plait.run(schedule, model, x, target), expected)
    assert torch.equal(x.grad, inner)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())


def test_a_branch_on_data_is_refused_with_its_line(step):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(GraphError, match=r"test_capture\.py:\d+"):
        plait.capture(Branching(), torch.randn(3))


def test_inputs_that_contradict_the_plan_are_refused(step):
    model, x, target = step
    plan = plait.ParallelPlan(num_micro_batches=4)
    with pytest.raises(PlanError, match="6 rows, which num_micro_batches=4 does not divide"):
        plait.capture(model, x, target, plan, loss=loss)


def test_inputs_of_another_shape_than_captured_are_refused(step):
    model, x, target = step
    schedule = plait.compile(plait.capture(model, x, target, loss=loss))
    with pytest.raises(PlanError, match=r"\(5, 8\), but the schedule was made for"):
        plait.run(schedule, model, x[:5], target[:5])


def test_a_plan_over_axes_that_capture_cannot_place_is_refused(step):
    with pytest.raises(PlanError, match="leave pp and cp at 1"):
        plait.capture(*step, plan=plait.ParallelPlan(pp=2), loss=loss)


def test_a_model_without_rules_of_placement_is_refused_under_tp(step):
    with pytest.raises(PlanError, match="rules"):
        plait.capture(*step, plan=plait.ParallelPlan(tp=4), loss=loss)


def test_a_level_that_does_not_exist_names_those_that_do(step):
    graph = plait.capture(*step, loss=loss)
    with pytest.raises(GraphError, match="O0"):
        plait.compile(graph, level="O7")
    with pytest.raises(GraphError, match="O0"):
        plait.jit(step[0], level="00")
