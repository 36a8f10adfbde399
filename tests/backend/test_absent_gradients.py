"""Gradients arrive for some of the outputs only: the backward leaves out what the others need."""

from itertools import combinations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import plait

SEED = 7


class Layer(nn.Module):
    """Attention that hands out its keys and values, as a layer with a cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(8) + 0.5)
        self.query_key_value = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.query_key_value(x).view(*x.shape[:2], 3, 2, 8)
        query, key, value = (each.transpose(1, 2) for each in heads.unbind(2))
        key = torch.cat([key[:, :, :0], key * self.norm], dim=2)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return x + self.out(attended.transpose(1, 2).reshape(x.shape)), key, value * 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(16, 5)
        self.gate = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        keys, values = [], []
        for layer in self.layers:
            x, key, value = layer(x)
            keys.append(key)
            values.append(value)
        # Softplus: its derivative's memory layout, PyTorch knows wrongly while it traces.
        gates = F.softplus(self.gate(x).view(2, 6, 2, 8).transpose(1, 2)).transpose(1, 2)
        logits = self.head(x + gates.reshape(x.shape))
        return {
            "loss": logits.square().mean(),
            "logits": logits,
            "keys": keys[0] + keys[2],
            "key": keys[1],
            "values": torch.stack(values),
            "x": x,
        }


OUTPUTS = ("loss", "logits", "keys", "key", "values", "x")


@pytest.fixture
def model() -> Model:
    torch.manual_seed(SEED)
    torch._dynamo.reset()
    return Model()


def gradients(run, model: Model, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    torch.manual_seed(SEED)
    model.zero_grad(set_to_none=True)
    x = torch.rand(2, 6, 16, requires_grad=True)
    outputs = run(x)
    weights = {name: torch.rand_like(outputs[name]) for name in OUTPUTS}
    torch.autograd.backward([outputs[n] for n in wanted], [weights[n] for n in wanted])
    named = [("x", x), *model.named_parameters()]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


def test_whichever_outputs_are_differentiated_gradients_have_eagers_bits(model):
    compiled = plait.jit(model)
    for count in range(1, len(OUTPUTS) + 1):
        for wanted in combinations(OUTPUTS, count):
            expected = gradients(model, model, wanted)
            found = gradients(compiled, model, wanted)
            unequal = [name for name in expected if not torch.equal(expected[name], found[name])]
            assert unequal == [], wanted


def test_no_zeros_are_made_for_logits_and_a_cache_of_which_nobody_wants_gradients(model):
    made: list[str] = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(str(func))
            return func(*args, **(kwargs or {}))

    compiled = plait.jit(model)
    x = torch.rand(2, 6, 16)
    compiled(x)["loss"].backward()
    loss = compiled(x)["loss"]
    with Operators():
        loss.backward()
    assert "aten.mm.default" in made
    assert not [name for name in made if "zeros" in name]


def test_what_reaches_a_parameter_only_through_an_absent_gradient_is_zero(model):
    found = gradients(plait.jit(model), model, ("key",))
    assert found["head.weight"].count_nonzero() == 0
    assert found["layers.1.norm"].count_nonzero() > 0
    assert found["layers.2.norm"].count_nonzero() == 0


def test_a_term_that_is_used_again_is_not_written_over(model):
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x.sin()
            return y, (y * 3).cos().sum() + (y.exp() * y).sum()

    x = torch.rand(4, 4, requires_grad=True)
    expected = torch.autograd.grad(Twice()(x)[1], x)
    found = torch.autograd.grad(plait.jit(Twice())(x)[1], x)
    assert torch.equal(expected[0], found[0])
