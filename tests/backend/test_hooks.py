"""Hooks that are registered or removed after the first call are noticed."""

import pytest
import torch
from torch import nn

import plait


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x)


MODELS = {
    "a single layer": (Single, "layer"),
    "one of several layers": (lambda: nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))), "1"),
    "the first block": (lambda: nn.Sequential(*(Layer() for _ in range(3))), "0"),
    "a later block": (lambda: nn.Sequential(*(Layer() for _ in range(3))), "2"),
    "a layer of a later block": (lambda: nn.Sequential(*(Layer() for _ in range(3))), "1.up"),
}
COMPILERS = {
    "jit": lambda model: plait.jit(model, cache=False),
    "jit of a function": lambda model: plait.jit(lambda x: model(x), cache=False),
    "backend": lambda model: torch.compile(model, backend="plait"),
}


def forward_hook(module):
    return module.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(module):
    return module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hook_with_keywords(module):
    return module.register_forward_hook(
        lambda module, args, kwargs, output: output * 2, with_kwargs=True
    )


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("place", MODELS)
@pytest.mark.parametrize("register", [forward_hook, pre_hook, hook_with_keywords])
def test_a_hook_registered_later_is_called_and_one_removed_is_not(compiler, place, register):
    torch._dynamo.reset()
    make, name = MODELS[place]
    model, x = make(), torch.randn(2, 8)
    compiled = COMPILERS[compiler](model)
    assert torch.equal(compiled(x), model(x))
    plain = model(x)
    handle = register(model.get_submodule(name))
    assert not torch.equal(model(x), plain)
    assert torch.equal(compiled(x), model(x))
    handle.remove()
    assert torch.equal(compiled(x), plain)


def test_a_backward_hook_registered_later_is_called():
    torch._dynamo.reset()
    model, x = Single(), torch.randn(2, 8)
    compiled = plait.jit(model, cache=False)
    compiled(x).sum().backward()
    model.layer.register_full_backward_hook(lambda module, given, taken: None)
    called = []
    model.layer.register_full_backward_hook(lambda module, given, taken: called.append(1))
    compiled(x.clone().requires_grad_()).sum().backward()
    assert called == [1]
