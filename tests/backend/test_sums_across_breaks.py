"""An activation has users before and behind a graph break: its gradient keeps eager's order."""

import pytest
import torch
from torch import Tensor, nn

import plait

# Dynamo itself reads .grad of a tensor that is no leaf where it resumes after a break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

SEED = 11


def is_positive(x: Tensor) -> bool:
    return x.sum().item() > 0  # breaks the graph


class Norm(nn.Module):
    """As Hugging Face writes it: its input has two users, behind a cast that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(32) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = Norm(), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(self.norm(x))
        if is_positive(hidden):
            hidden = hidden * 1.5
        return x + self.down(hidden * hidden)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.pow(2).sum()


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(run, parameters, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(run(x), parameters))


def unequal(expected: list[Tensor], found: list[Tensor]) -> list[int]:
    pairs = zip(expected, found, strict=True)
    return [i for i, (x, y) in enumerate(pairs) if not torch.equal(x, y)]


def test_a_norm_before_the_break_and_a_residual_behind_it_add_as_in_eager():
    torch.manual_seed(SEED)
    model, x = Model(), torch.randn(8, 32)
    compiled = plait.jit(model)
    parameters = list(model.parameters())
    assert unequal(gradients(model, parameters, x), gradients(compiled, parameters, x)) == []
    assert compiled.report().breaks


def test_so_they_do_where_shapes_are_dynamic():
    torch.manual_seed(SEED)
    model = Model()
    compiled = plait.jit(model, dynamic=True)
    parameters = list(model.parameters())
    for rows in (8, 5, 13):
        x = torch.randn(rows, 32)
        assert unequal(gradients(model, parameters, x), gradients(compiled, parameters, x)) == []


def test_a_tensor_that_one_operator_takes_twice_adds_as_in_eager():
    def program(x: Tensor) -> Tensor:
        y = x.sin()
        z = (y * y).exp() + torch.logaddexp(y, y.cos())
        return (z if is_positive(z) else -z).sum() + (y / 3).sum()

    torch.manual_seed(SEED)
    x = torch.randn(64, requires_grad=True)
    assert unequal(gradients(program, [x], x), gradients(plait.jit(program), [x], x)) == []


def test_what_is_changed_in_place_is_changed_for_all_its_users():
    def program(x: Tensor) -> Tensor:
        y = x.sin()
        z = y.exp()
        if is_positive(z):
            y.mul_(2)
        return (y * y + z).sum() + y.sum()

    torch.manual_seed(SEED)
    x = torch.randn(64, requires_grad=True)
    assert unequal(gradients(program, [x], x), gradients(plait.jit(program), [x], x)) == []


def test_a_graph_called_within_a_larger_eager_program_adds_as_in_eager():
    torch.manual_seed(SEED)
    norm, x = Norm(), torch.randn(8, 32, requires_grad=True)
    compiled = plait.jit(norm)

    def program(layer):
        def run(x: Tensor) -> Tensor:
            y = x.sin()
            return (y + layer(y).tanh()).sum() + y.cos().sum()

        return run

    for _ in range(2):
        found = gradients(program(compiled), [x], x)
        assert unequal(gradients(program(norm), [x], x), found) == []


def test_an_operator_with_several_uses_inside_adds_as_in_eager():
    torch.manual_seed(SEED)
    norm, x = nn.RMSNorm(32), torch.randn(8, 32, requires_grad=True)

    def program(x: Tensor) -> Tensor:
        return (norm(x) + x.tanh()).square().sum() + x.cos().sum()

    assert unequal(gradients(program, [x], x), gradients(plait.jit(program), [x], x)) == []


def test_what_every_block_takes_twice_adds_as_in_eager():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor, encoded: Tensor) -> Tensor:
            return x + torch.softmax(x @ self.key(encoded).mT, -1) @ self.value(encoded)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Cross() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            encoded = x.sin()
            start = x if is_positive(encoded * encoded) else -x
            for layer in self.layers:
                start = layer(start, encoded)
            return start.sum() + encoded.exp().sum()

    torch.manual_seed(SEED)
    model, x = Decoder(), torch.randn(8, 32, requires_grad=True)
    assert unequal(gradients(model, [x], x), gradients(plait.jit(model), [x], x)) == []
