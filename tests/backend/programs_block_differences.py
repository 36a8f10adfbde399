"""Repeated layers of which one differs in one thing: what may not be taken for the others."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .program import Call, Case, Program, calls, collect, program

WIDTH = 6


class Layer(nn.Module):
    """A residual layer with one attribute of each kind."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.activation = nn.GELU()
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.25)
        self.register_buffer("table", torch.linspace(0, 1, WIDTH))
        self.kind = "plain"
        self.power = 1
        self.gain = 1.0
        self.order = [0, 1]
        self.options = {"shift": 0.0}
        self.extra: Tensor | None = None
        self.function: Callable[[Tensor], Tensor] = torch.tanh
        self.is_wide = False

    def forward(self, x):
        hidden = self.activation(self.up(self.norm(x)))
        y = self.dropout(self.down(hidden)) * self.gain + self.table + self.options["shift"]
        y = self.function(y) if self.kind == "plain" else y.exp()
        if self.extra is not None:
            y = y + self.extra
        for i in self.order:
            y = y * (1 + 0.1 * i)
        if self.is_wide or self.power > 1:
            y = y * 2**self.power
        return x + y


_DIFFERENCES: list[Callable[[Layer], object]] = []


def _difference(change: Callable[[Layer], object]) -> Program:
    """Change the last layer before the first call, and the middle one before the second."""

    def build() -> Case:
        model = nn.Sequential(*(Layer() for _ in range(3)))
        change(model[2])
        return calls(model, Call(_leaf()), Call(_leaf(), before=lambda: change(model[1])))

    _DIFFERENCES.append(change)
    return Program(f"block_with_{change.__name__}", None, build)


def _but_one(change: Callable[[Layer], object]) -> Program:
    """Change all layers but the last before the first call: what the last has, no other has."""

    def build() -> Case:
        model = nn.Sequential(*(Layer() for _ in range(3)))
        for layer in model[:2]:
            change(layer)
        return calls(model, Call(_leaf()), Call(_leaf()))

    return Program(f"blocks_with_{change.__name__}_but_one", None, build)


def _leaf() -> Tensor:
    return torch.randn(3, WIDTH, requires_grad=True)


@_difference
def another_string(layer: Layer):
    layer.kind = "exp"


@_difference
def another_integer(layer: Layer):
    layer.power = 2


@_difference
def another_float(layer: Layer):
    layer.gain = 0.5


@_difference
def another_boolean(layer: Layer):
    layer.is_wide = True


@_difference
def another_list(layer: Layer):
    layer.order = [3, 1, 2]


@_difference
def a_list_changed_in_place(layer: Layer):
    layer.order.append(5)


@_difference
def a_dictionary_changed_in_place(layer: Layer):
    layer.options["shift"] = 0.5


@_difference
def another_function(layer: Layer):
    layer.function = torch.sin


@_difference
def a_tensor_where_others_have_none(layer: Layer):
    layer.extra = torch.full((WIDTH,), 0.5)


@_difference
def another_kind_of_child(layer: Layer):
    layer.activation = nn.ReLU()


@_difference
def a_child_that_does_nothing(layer: Layer):
    layer.norm = nn.Identity()


@_difference
def a_child_with_a_method_of_its_own(layer: Layer):
    layer.activation.forward = torch.relu


@_difference
def another_probability_of_dropout(layer: Layer):
    layer.dropout.p = 0.75


@_difference
def no_dropout_at_all(layer: Layer):
    layer.dropout = nn.Identity()


@_difference
def no_bias(layer: Layer):
    layer.up.bias = None


@_difference
def a_child_in_evaluation(layer: Layer):
    layer.dropout.eval()


@_difference
def all_of_it_in_evaluation(layer: Layer):
    layer.eval()


@_difference
def another_epsilon(layer: Layer):
    layer.norm.eps = 0.1


@_difference
def a_wider_middle(layer: Layer):
    torch.manual_seed(3)
    layer.up, layer.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)


@_difference
def a_scalar_table(layer: Layer):
    layer.table = torch.tensor(0.5)


@_difference
def a_frozen_weight(layer: Layer):
    layer.up.weight.requires_grad_(False)
    layer.up.weight.grad = None


@_difference
def a_forward_hook(layer: Layer):
    layer.register_forward_hook(lambda module, args, output: output * 2)


@_difference
def a_forward_hook_of_a_child(layer: Layer):
    layer.down.register_forward_hook(lambda module, args, output: output.tanh())


@_difference
def a_hook_before_its_forward(layer: Layer):
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


@_difference
def a_hook_of_a_parameter(layer: Layer):
    layer.up.weight.register_hook(lambda gradient: gradient * 3)


@_difference
def a_method_of_its_own(layer: Layer):
    layer.forward = lambda x: x * 2


@_difference
def a_parametrized_weight(layer: Layer):
    parametrizations.weight_norm(layer.up)


@_difference
def a_tied_child(layer: Layer):
    layer.up.weight = nn.Parameter(layer.down.weight.detach().t().clone())
    layer.up.bias = nn.Parameter(torch.ones(2 * WIDTH))


class Step(nn.Module):
    """A layer that takes what it is given."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y=None, *, power=1, parts=(), named=None):
        x = self.linear(x) + (0 if y is None else x * y + y.sum())
        for part in parts:
            x = x + part * power
        return x.tanh() if named is None else x.tanh() * named["gain"]


def given(arguments: Callable[[Tensor, int], tuple[tuple, dict]]) -> Case:
    """Give layer number i the arguments that a function makes from x and i."""
    layers = nn.ModuleList(Step() for _ in range(6))

    def f(x):
        for i, layer in enumerate(layers):
            positional, named = arguments(x, i)
            x = layer(*positional, **named)
        return x

    return calls(f, Call(_leaf()), Call(_leaf()), watch=[layers])


@program(graphs=1)
def blocks_given_the_same_tensor_twice_at_first():
    return given(lambda x, i: ((x, x if i < 3 else x * 2), {}))


@program(graphs=1)
def blocks_given_the_same_tensor_twice_at_last():
    return given(lambda x, i: ((x, x * 2 if i < 3 else x), {}))


@program(graphs=1)
def blocks_given_a_view_of_their_input():
    return given(lambda x, i: ((x, x.view(-1)[i:][:WIDTH] if i % 2 else x[0].clone()), {}))


@program(graphs=1)
def blocks_given_none_or_a_tensor():
    return given(lambda x, i: ((x, None if i % 2 else x.sin()), {}))


@program(graphs=1)
def blocks_given_their_number():
    return given(lambda x, i: ((x,), {"power": i % 3, "parts": [x.cos()]}))


@program(graphs=1)
def blocks_given_longer_and_longer_lists():
    return given(lambda x, i: ((x,), {"parts": [x.sin() * j for j in range(i)]}))


@program(graphs=1)
def blocks_given_dictionaries():
    return given(lambda x, i: ((x,), {"named": {"gain": x.mean() if i % 2 else 0.5}}))


@program(graphs=1)
def blocks_given_several_layouts():
    return given(lambda x, i: ((x, x.t().contiguous().t() if i % 2 else x.exp()), {}))


@program(graphs=1)
def blocks_given_several_shapes():
    return given(lambda x, i: ((x, x[: 1 + 2 * (i % 2)].sin()), {}))


@program(graphs=1)
def blocks_given_several_dtypes():
    return given(lambda x, i: ((x, (x[0] * 3).int() if i % 2 else x[0].sin()), {}))


@program(graphs=1)
def blocks_given_tensors_with_and_without_gradient():
    return given(lambda x, i: ((x, x.detach().sin() if i % 2 else x.sin()), {}))


@program(graphs=1)
def blocks_of_which_some_run_without_gradient():
    layers = nn.ModuleList(Step() for _ in range(6))

    def f(x):
        total = x
        for i, layer in enumerate(layers):
            with torch.set_grad_enabled(i % 2 == 0):
                total = total + layer(total.sin())
        return total

    return calls(f, Call(_leaf()), Call(_leaf()), watch=[layers])


@program(graphs=1)
def blocks_of_which_some_run_under_autocast():
    layers = nn.ModuleList(Step() for _ in range(6))

    def f(x):
        for i, layer in enumerate(layers):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=i % 2 == 0):
                x = layer(x.float())
        return x.float()

    return calls(f, Call(_leaf()), Call(_leaf()), watch=[layers])


@program(graphs=1)
def blocks_called_in_another_order():
    layers = nn.ModuleList(Step() for _ in range(4))

    def f(x):
        kept = [layer(x, x) for layer in layers]
        for layer in reversed(layers):
            x = layer(x, kept.pop())
        return x

    return calls(f, Call(_leaf()), Call(_leaf()), watch=[layers])


PROGRAMS = [*collect(globals()), *map(_but_one, _DIFFERENCES)]
