"""Programs whose difficulty is Python's control flow."""

import functools
import itertools
import json
import re
from contextlib import contextmanager
from enum import Enum

import numpy as np
import torch
from torch import nn

from .program import Call, calls, collect, program

SCALE = 2.0
TABLE = {"gain": 3.0}


def leaf(*shape: int, **options):
    """Draw a tensor that wants a gradient."""
    return torch.randn(*shape, requires_grad=True, **options)


@program(graphs=1)
def closure_over_a_tensor():
    weight = leaf(4)

    def f(x):
        return (x * weight).sin()

    return calls(f, Call(leaf(3, 4)), Call(leaf(3, 4)), watch=[weight])


@program(graphs=2)
def closure_over_a_number_that_changes():
    factor = 1

    def grow():
        nonlocal factor
        factor = 5

    def f(x):
        return x.exp() * factor

    return calls(f, Call(leaf(4)), Call(leaf(4), before=grow))


@program(graphs=1)
def generator_function():
    def powers(x):
        value = x
        for _ in range(3):
            yield value
            value = value * x

    def f(x):
        return sum(powers(x))

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def generator_expression_and_comprehensions():
    def f(x):
        rows = [row * i for i, row in enumerate(x)]
        named = {f"row{i}": row.sum() for i, row in enumerate(rows)}
        return sum(value for key, value in named.items() if key != "row0")

    return calls(f, Call(leaf(3, 4)), Call(leaf(3, 4)))


@program(graphs=3, breaks=("if x.sum() > 0:",))
def branch_on_data():
    def f(x):
        x = x * 2
        if x.sum() > 0:
            return x.cos()
        return x.sin()

    return calls(f, Call(torch.ones(3).requires_grad_()), Call((-torch.ones(3)).requires_grad_()))


@program(graphs=3, breaks=(".item()",))
def item_in_arithmetic():
    def f(x):
        largest = x.max().item()
        return x / largest

    return calls(f, Call(leaf(4)), Call(leaf(4)), Call(leaf(4)))


@program(graphs=2)
def item_as_a_loop_bound():
    def f(x, n):
        for _ in range(n.item()):
            x = x.sin()
        return x

    return calls(f, Call(leaf(4), torch.tensor(2)), Call(leaf(4), torch.tensor(3)))


@program(graphs=2)
def try_except_around_a_lookup():
    def f(x, name):
        try:
            gain = TABLE[name]
        except KeyError:
            gain = 0.5
        return x.tanh() * gain

    return calls(f, Call(leaf(4), "gain"), Call(leaf(4), "other"))


@program(graphs=2)
def try_finally():
    log = []

    def f(x):
        try:
            return x.sigmoid()
        finally:
            log.append("done")

    return calls(f, Call(leaf(4)), Call(leaf(4)), watch=[log])


@program(graphs=2)
def early_return():
    def f(x, skip):
        if skip:
            return x + 1
        x = x.relu()
        return x * 3

    return calls(f, Call(leaf(4), True), Call(leaf(4), False))


@program(graphs=1)
def while_loop_on_a_number():
    def f(x):
        n = 0
        while n < 4:
            x = x * 0.5 + 1
            n += 1
            if n == 3:
                break
        else:
            x = x * 100
        return x

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=6)
def while_loop_on_data():
    def f(x):
        while x.abs().sum() > 1:
            x = x / 2
        return x.exp()

    return calls(f, Call(torch.full((4,), 0.9).requires_grad_()), Call(torch.full((4,), 0.8)))


@program(graphs=2)
def recursion():
    def nested(x, depth):
        return x if depth == 0 else nested(x, depth - 1).sin() + depth

    return calls(nested, Call(leaf(4), 3), Call(leaf(4), 2))


@program(graphs=1)
def lambdas_and_functools():
    def f(x):
        steps = [lambda y: y + 1, lambda y: y * y, functools.partial(torch.clamp, max=2.0)]
        composed = functools.reduce(lambda g, h: lambda y: h(g(y)), steps)
        return composed(x)

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def enumerate_zip_and_itertools():
    def f(xs, weights):
        total = 0
        for i, (x, weight) in enumerate(zip(xs, weights, strict=True)):
            total = total + x * weight * i
        for first, second in itertools.combinations(xs, 2):
            total = total + first * second
        return total

    return calls(f, Call([leaf(4) for _ in range(3)], [1, 2, 3]))


@program(graphs=2, breaks=("print(",))
def print_between():
    def f(x):
        y = x.sin()
        print(f"shape {tuple(y.shape)}")  # noqa: T201
        return y.cos()

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=2)
def print_of_a_value():
    def f(x):
        y = x.detach().round()
        print("value", y)  # noqa: T201
        return x * 2

    return calls(f, Call(leaf(2)), Call(leaf(2)))


@program(graphs=3)
def dispatch_on_type():
    def f(x):
        match x:
            case (first, second):
                return first * second
            case {"value": value}:
                return value * 2
            case _ if isinstance(x, torch.Tensor):
                return x.neg()

    return calls(f, Call(leaf(4)), Call((leaf(4), leaf(4))), Call({"value": leaf(4)}))


@program(graphs=2)
def dispatch_on_a_string_and_an_enum():
    kind = Enum("kind", ["RELU", "GELU"])
    functions = {"tanh": torch.tanh, "exp": torch.exp}

    def f(x, name, which):
        x = torch.relu(x) if which is kind.RELU else nn.functional.gelu(x)
        return functions[name](x)

    return calls(f, Call(leaf(4), "tanh", kind.RELU), Call(leaf(4), "exp", kind.GELU))


@program(graphs=2)
def branch_on_the_shape():
    def f(x):
        if x.shape[0] > 4:
            return x.mean(0)
        return x.sum(0) * len(x)

    return calls(f, Call(leaf(3, 2)), Call(leaf(6, 2)))


@program(graphs=2)
def global_that_changes():
    def set_scale(value):
        global SCALE
        SCALE = value

    def f(x):
        return x.sin() * SCALE

    set_scale(2.0)
    return calls(f, Call(leaf(4)), Call(leaf(4), before=lambda: set_scale(3.0)))


@program(graphs=2)
def numbers_that_change():
    def f(x, count, factor):
        return (x + count).tanh() * factor

    return calls(f, *(Call(leaf(4), i, i / 2) for i in (2, 3, 5, 8)))


@program(graphs=None)
def exponent_that_changes():
    def f(x, power):
        return x**power

    return calls(f, Call(leaf(4), 2), Call(leaf(4), 3), Call(leaf(4), 4))


@program(graphs=2)
def none_arguments():
    def f(x, bias=None):
        return x.exp() if bias is None else x.exp() + bias

    return calls(f, Call(leaf(4)), Call(leaf(4), leaf(4)), Call(leaf(4), None))


@program(graphs=2)
def keyword_only_and_default_arguments():
    def f(x, /, y=1.0, *, shift=2, flip=False):
        result = (x * y).sin() + shift
        return result.flip(0) if flip else result

    return calls(f, Call(leaf(4)), Call(leaf(4), leaf(4), shift=3, flip=True))


@program(graphs=2)
def variable_arguments():
    def f(*tensors, **named):
        return sum(tensors) * named["gain"] + named.get("bias", 0)

    return calls(f, Call(leaf(4), leaf(4), gain=leaf(4)), Call(leaf(4), gain=leaf(1), bias=leaf(4)))


@program(graphs=1)
def call_of_numpy():
    def f(x):
        window = np.hanning(4).astype(np.float32)
        return x * torch.from_numpy(window)

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def call_of_json():
    def f(x):
        settings = json.loads('{"gain": 2.5}')
        return x.sin() * settings["gain"]

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def call_of_a_regular_expression():
    def f(x, name):
        y = x.sin()
        if re.match(r"layer\d+$", name):
            y = y * 2
        return y

    return calls(f, Call(leaf(4), "layer12"), Call(leaf(4), "layer12"))


@program(graphs=2, breaks=("untraced(",))
def disabled_function():
    @torch.compiler.disable
    def untraced(x):
        return x * 3 if x.sum().item() > 0 else x * 5

    def f(x):
        return untraced(x.sin()).cos()

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=2)
def own_context_manager():
    log = []

    @contextmanager
    def stage(name):
        log.append(f"enter {name}")
        yield 2.0
        log.append(f"leave {name}")

    def f(x):
        with stage("first") as factor:
            return x.sin() * factor

    return calls(f, Call(leaf(4)), Call(leaf(4)), watch=[log])


@program(graphs=1)
def autocast_inside():
    linear = nn.Linear(8, 8)

    def f(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = linear(x)
            with torch.autocast("cpu", enabled=False):
                z = linear(y.float())
        return y, z

    return calls(f, Call(leaf(3, 8)), Call(leaf(3, 8)), watch=[linear])


@program(graphs=2)
def autocast_outside():
    linear = nn.Linear(8, 8)

    def script(run):
        outputs = []
        for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
            with torch.autocast("cpu", dtype=dtype):
                outputs.append(run(torch.ones(2, 8)))
        return [output.float().tolist() for output in outputs]

    case = calls(linear)
    return type(case)(linear, script)


@program(graphs=2)
def function_that_raises():
    def f(x, limit):
        y = x.sin()
        if limit > 3:
            raise ValueError(f"limit={limit} is above 3")
        return y

    return calls(f, Call(leaf(4), 2), Call(leaf(4), 5), Call(leaf(4), 2))


@program(graphs=1)
def kernel_that_raises():
    table = leaf(5, 3)

    def f(index):
        rows = table * 2
        return nn.functional.embedding(index, rows)

    return calls(f, Call(torch.tensor([1, 4])), Call(torch.tensor([1, 7])), watch=[table])


@program(graphs=0)
def shapes_that_do_not_match():
    def f(x, y):
        return x @ y

    return calls(f, Call(leaf(2, 3), leaf(2, 3)))


@program(graphs=2)
def assertion_on_data():
    def f(x):
        assert x.min() > 0, "must be positive"
        return x.log()

    return calls(f, Call(torch.ones(3).requires_grad_()), Call(torch.full((3,), 2.0)))


@program(graphs=1)
def callable_object():
    class Scaler:
        def __init__(self):
            self.factor = 3.0

        def __call__(self, x):
            return self.apply_to(x)

        def apply_to(self, x):
            return x.sin() * self.factor

    return calls(Scaler(), Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def decorated_function():
    def twice(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(function(*args, **kwargs), **kwargs)

        return wrapper

    @twice
    def f(x, *, shift):
        return x.sin() + shift

    return calls(f, Call(leaf(4), shift=1), Call(leaf(4), shift=1))


@program(graphs=1)
def sorting_and_built_ins():
    def f(tensors):
        tensors = sorted(tensors, key=lambda tensor: tensor.shape[0], reverse=True)
        largest = max(tensor.shape[0] for tensor in tensors)
        if any(len(tensor) == 3 for tensor in tensors) and all(map(torch.is_tensor, tensors)):
            largest += 1
        return torch.cat(tensors) * largest

    return calls(f, Call([leaf(2), leaf(4), leaf(3)]))


PROGRAMS = collect(globals())
