"""The optimizer as a program of the schedule: eager's bits over several steps."""

from copy import deepcopy

import pytest
import torch
from torch import nn

import plait
from plait.errors import GraphError, PlanError
from plait.executor.profile import profile_step
from plait.graph.graph import Role
from plait.graph.storage import from_json, to_json
from plait.graph.verify_schedule import verify_schedule
from plait.train.optimizer import OptimizerSettings, make_optimizers, set_learning_rate

WIDTH = 12


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def squares(model, x):
    return model(x).square().mean()


def named(model):
    return [(name, p) for name, p in model.named_parameters() if "unused" not in name]


def weights(model):
    return [(name, p) for name, p in named(model) if p.dim() == 2]


def two_groups(model):
    vectors = [p for _, p in named(model) if p.dim() == 1]
    matrices = [p for _, p in named(model) if p.dim() == 2]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "lr": 3e-3}]
    return torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.2, fused=True)


class Buffered(torch.optim.SGD):
    """Goes on computing with what it has just changed in place: that must stay its own."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                    buffer.add_(p.grad)
                    p.sub_(buffer.mul_(0.9) * group["lr"])


optim = torch.optim
OPTIMIZERS = {
    "adamw": lambda m: optim.AdamW(m.named_parameters(), lr=1e-2, fused=True),
    "adamw-groups": two_groups,
    "adamw-amsgrad": lambda m: optim.AdamW(named(m), lr=1e-2, fused=True, amsgrad=True),
    "adamw-tensor-rate": lambda m: optim.AdamW(named(m), lr=torch.tensor(1e-2), fused=True),
    "adam": lambda m: optim.Adam(m.named_parameters(), lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda m: optim.SGD(m.named_parameters(), lr=1e-2, weight_decay=0.3),
    "sgd-momentum": lambda m: optim.SGD(
        m.named_parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1, foreach=True
    ),
    "sgd-nesterov": lambda m: optim.SGD(named(m), lr=1e-2, momentum=0.9, nesterov=True),
    "buffered": lambda m: Buffered(m.named_parameters(), lr=1e-2),
    "muon": lambda m: optim.Muon(weights(m), lr=1e-2, adjust_lr_fn="match_rms_adamw"),
    "plait-muon-and-adamw": lambda m: make_optimizers(m, OptimizerSettings(kind="muon")),
}


def tower():
    torch.manual_seed(0)
    return Tower()


def listed(optimizer):
    return optimizer if isinstance(optimizer, list) else [optimizer]


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def state_of(optimizer):
    """Every tensor of the optimizers' states, by number of the parameter."""
    return {
        (i, number, key): x
        for i, each in enumerate(listed(optimizer))
        for number, state in each.state_dict()["state"].items()
        for key, x in state.items()
    }


def assert_same(model, optimizer, twin, twin_optimizer):
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), name
    mine, eager = state_of(optimizer), state_of(twin_optimizer)
    assert mine.keys() == eager.keys()
    assert all(torch.equal(x, eager[key]) for key, x in mine.items())


def rate(optimizer, value):
    for each in listed(optimizer):
        for group in each.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(value)
            else:
                group["lr"] = value


def eager_step(model, optimizer, x):
    loss = squares(model, x)
    loss.backward()
    for each in listed(optimizer):
        each.step()
        each.zero_grad()
    return loss.detach()


def trained_parameters_only(model):
    """AdamW of all of make_optimizers has the unused ones too: they must not be trained."""
    model.unused.requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_have_the_bits_of_eager_and_the_rate_may_change(kind):
    model, twin = trained_parameters_only(tower()), trained_parameters_only(tower())
    optimizer, twin_optimizer = OPTIMIZERS[kind](model), OPTIMIZERS[kind](twin)
    x = torch.randn(5, WIDTH)
    graph = plait.capture(model, x, loss=squares)
    schedule = plait.compile(graph, optimizer=optimizer)
    verify_schedule(schedule)
    schedule = from_json(to_json(schedule))
    for value in (1e-2, 1e-2, 5e-3, 0.0, 2e-2):
        rate(optimizer, value)
        rate(twin_optimizer, value)
        x = torch.randn(5, WIDTH)
        loss = plait.run(schedule, model, x, optimizer=optimizer)
        assert torch.equal(loss, eager_step(twin, twin_optimizer, x))
        assert all(p.grad is None for each in listed(optimizer) for p in params_of(each))
        assert_same(model, optimizer, twin, twin_optimizer)


def test_micro_batches_are_added_before_one_step():
    model, twin = tower(), tower()
    plan = plait.ParallelPlan(num_micro_batches=2)
    x = torch.randn(6, WIDTH)
    optimizer, twin_optimizer = OPTIMIZERS["adamw"](model), OPTIMIZERS["adamw"](twin)
    schedule = plait.compile(plait.capture(model, x, plan, loss=squares), plan, optimizer=optimizer)
    for _ in range(3):
        plait.run(schedule, model, x, optimizer=optimizer)
        for part in x.chunk(2):
            (squares(twin, part) / 2).backward()
        twin_optimizer.step()
        twin_optimizer.zero_grad()
        assert_same(model, optimizer, twin, twin_optimizer)


def test_a_state_that_was_loaded_is_gone_on_with():
    model, twin = tower(), tower()
    x = torch.randn(5, WIDTH)
    twin_optimizer = OPTIMIZERS["adamw"](twin)
    for _ in range(2):
        eager_step(twin, twin_optimizer, x)
    model.load_state_dict(twin.state_dict())
    optimizer = OPTIMIZERS["adamw"](model)
    optimizer.load_state_dict(deepcopy(twin_optimizer.state_dict()))
    schedule = plait.compile(plait.capture(model, x, loss=squares), optimizer=optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    twin_scheduler = torch.optim.lr_scheduler.StepLR(twin_optimizer, 1, gamma=0.5)
    for _ in range(3):
        plait.run(schedule, model, x, optimizer=optimizer)
        eager_step(twin, twin_optimizer, x)
        scheduler.step()
        twin_scheduler.step()
        assert_same(model, optimizer, twin, twin_optimizer)


def test_a_step_takes_no_memory_for_copies():
    model = tower()
    x = torch.randn(5, WIDTH)
    optimizer = OPTIMIZERS["adamw"](model)
    schedule = plait.compile(plait.capture(model, x, loss=squares), optimizer=optimizer)
    addresses = [p.data_ptr() for p in model.parameters()]
    plait.run(schedule, model, x, optimizer=optimizer)
    states = [s.data_ptr() for s in state_of(optimizer).values()]
    plait.run(schedule, model, x, optimizer=optimizer)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert [s.data_ptr() for s in state_of(optimizer).values()] == states
    program = schedule.programs["optimizer"]
    assert [step.target for step in program.steps] == [
        "aten._foreach_add_.Scalar",
        "aten._fused_adamw_.default",
    ]


def test_inputs_are_named_by_role():
    model = tower()
    graph = plait.capture(model, torch.randn(5, WIDTH), loss=squares)
    schedule = plait.compile(graph, optimizer=OPTIMIZERS["adamw"](model))
    names = {(value.role, value.name) for value in schedule.optimizer_inputs}
    assert (Role.PARAMETER, "layers.0.up.weight") in names
    assert (Role.GRADIENT, "layers.0.up.weight") in names
    assert (Role.STATE, "layers.0.up.weight/exp_avg") in names
    assert (Role.STATE, "group 0/lr") in names
    assert (Role.GRADIENT, "unused.weight") not in names
    assert "state_layers_0_up_weight_exp_avg" in schedule.programs["optimizer"].inputs


def test_a_profile_of_a_step_shows_the_optimizer():
    model = tower()
    x = torch.randn(5, WIDTH)
    optimizer = OPTIMIZERS["adamw"](model)
    schedule = plait.compile(plait.capture(model, x, loss=squares), optimizer=optimizer)
    plait.run(schedule, model, x, optimizer=optimizer)
    twin = tower()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = OPTIMIZERS["adamw"](twin)
    twin_optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    profile = profile_step(schedule, model, x, optimizer=optimizer)
    assert torch.equal(profile.outcome.outputs[0], eager_step(twin, twin_optimizer, x))
    assert_same(model, optimizer, twin, twin_optimizer)
    last = profile.timeline.events[-1]
    assert (last.program, last.operator) == ("optimizer", "aten._fused_adamw_.default")


def test_what_is_no_program_is_refused():
    model = tower()
    x = torch.randn(5, WIDTH)
    graph = plait.capture(model, x, loss=squares)
    with pytest.raises(GraphError, match=r"AdamW reads a value on the host.*Use fused=True"):
        plait.compile(graph, optimizer=torch.optim.AdamW(model.named_parameters()))
    with pytest.raises(GraphError, match="belongs to a training step"):
        plait.compile(plait.capture(model, x), optimizer=OPTIMIZERS["sgd"](model))
    hooked = OPTIMIZERS["sgd"](model)
    hooked.register_step_post_hook(lambda *_: None)
    with pytest.raises(GraphError, match="SGD has step hooks"):
        plait.compile(graph, optimizer=hooked)
    with pytest.raises(GraphError, match="no parameter of SGD has a gradient"):
        plait.compile(graph, optimizer=torch.optim.SGD(nn.Linear(2, 2).named_parameters()))
    with pytest.raises(GraphError, match=r"torch.optim is needed, got 'adamw'"):
        plait.compile(graph, optimizer=["adamw"])


class Counting(torch.optim.SGD):
    """Keeps its count as a number, so a program would never change it."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1


class Rooted(torch.optim.SGD):
    """Hides its learning rate's way into a constant."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-(float(str(float(group["lr"]))) ** 0.5))


def test_an_optimizer_that_runs_the_model_itself_is_refused():
    model = tower()
    graph = plait.capture(model, torch.randn(5, WIDTH), loss=squares)
    with pytest.raises(GraphError, match=r"LBFGS.*missing a required argument: 'closure'"):
        plait.compile(graph, optimizer=torch.optim.LBFGS(model.parameters()))


def test_numbers_that_a_program_would_freeze_are_refused():
    model = tower()
    graph = plait.capture(model, torch.randn(5, WIDTH), loss=squares)
    with pytest.raises(GraphError, match="keeps 'count' as a int"):
        plait.compile(graph, optimizer=Counting(model.named_parameters(), lr=0.1))
    with pytest.raises(GraphError, match="learning rate in a way that Plait cannot follow"):
        plait.compile(graph, optimizer=Rooted(model.named_parameters(), lr=0.1))


def test_another_optimizer_than_the_compiled_one_is_refused():
    model = tower()
    x = torch.randn(5, WIDTH)
    graph = plait.capture(model, x, loss=squares)
    optimizer = OPTIMIZERS["adamw"](model)
    schedule = plait.compile(graph, optimizer=optimizer)
    with pytest.raises(GraphError, match="compiled with an optimizer, and none is given"):
        plait.run(schedule, model, x)
    with pytest.raises(GraphError, match="compiled with no optimizer, and one is given"):
        plait.run(plait.compile(graph), model, x, optimizer=optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(GraphError, match="not as it was compiled"):
        plait.run(schedule, model, x, optimizer=optimizer)
    assert all(p.grad is None for p in model.parameters())
    optimizer.param_groups[0]["weight_decay"] = 0.01
    model.unused(torch.ones(2)).sum().backward()
    with pytest.raises(PlanError, match="parameters with gradients that its program does not know"):
        plait.run(schedule, model, x, optimizer=optimizer)


def test_unnamed_parameters_without_gradients_are_named_in_the_error():
    model = tower()
    x = torch.randn(5, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = plait.compile(plait.capture(model, x, loss=squares), optimizer=optimizer)
    number = len(named(model))
    with pytest.raises(PlanError, match=rf"the gradient {number}: there is none"):
        plait.run(schedule, model, x, optimizer=optimizer)


def test_setting_the_rate_as_plait_train_does_reaches_the_program():
    model, twin = trained_parameters_only(tower()), trained_parameters_only(tower())
    settings = OptimizerSettings(kind="muon")
    optimizers, twins = make_optimizers(model, settings), make_optimizers(twin, settings)
    x = torch.randn(5, WIDTH)
    schedule = plait.compile(plait.capture(model, x, loss=squares), optimizer=optimizers)
    for step in range(4):
        for each in (optimizers, twins):
            set_learning_rate(each, settings.learning_rate_at(step, 4))
        plait.run(schedule, model, x, optimizer=optimizers)
        eager_step(twin, twins, x)
        assert_same(model, optimizers, twin, twins)
