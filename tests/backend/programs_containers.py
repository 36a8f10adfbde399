"""Programs whose difficulty is what goes in and what comes out."""

import dataclasses
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .program import Call, Case, calls, collect, go_backward, program, snapshot


def leaf(*shape: int, **options):
    """Draw a tensor that wants a gradient."""
    return torch.randn(*shape, requires_grad=True, **options)


@dataclass(frozen=True)
class Batch:
    """Tokens and a mask."""

    values: Tensor
    mask: Tensor | None = None
    scale: float = 1.0


@dataclass
class Result:
    """Loss and what it was made of."""

    loss: Tensor
    parts: dict[str, Tensor]
    name: str = "result"


class Pair(NamedTuple):
    """Two tensors."""

    first: Tensor
    second: Tensor


@program(graphs=2)
def frozen_dataclass_as_input():
    def f(batch):
        values = batch.values * batch.scale
        return values if batch.mask is None else values.masked_fill(~batch.mask, 0)

    mask = torch.tensor([True, False, True, True])
    values = [leaf(4), leaf(4)]
    given = [Call(Batch(values[0])), Call(Batch(values[1], mask, 2.0))]
    return calls(f, *given, watch=values)


@program(graphs=1)
def dataclass_as_output():
    def f(x):
        parts = {"sin": x.sin().sum(), "cos": x.cos().sum()}
        return Result(sum(parts.values()), parts)

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def dataclass_replaced_inside():
    def f(x):
        batch = Batch(x)
        batch = dataclasses.replace(batch, values=batch.values * 2, scale=3.0)
        return batch.values * batch.scale

    return calls(f, Call(leaf(4)))


@program(graphs=1)
def named_tuple_as_output():
    def f(x):
        return Pair(first=x.sin(), second=x.cos())._replace(second=x.exp())

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def nested_output():
    def f(x):
        return {"a": [x.sin(), (x.cos(), None)], "b": {"c": x.exp(), "n": 3, "s": "text"}, 7: 0.5}

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def nested_input():
    def f(tree):
        return tree["a"][0] * tree["a"][1]["b"] + tree["c"]

    def tree():
        return {"a": [leaf(4), {"b": leaf(4)}], "c": leaf(1)}

    return calls(f, Call(tree()), Call(tree()))


@program(graphs=1)
def one_tensor_returned_twice():
    def f(x):
        y = x.sin()
        return y, [y, x]

    case = calls(f, Call(leaf(4)), Call(leaf(4)))
    x = leaf(4)

    def script(run):
        first, (second, third) = run(x)
        go_backward([first, second])
        return [case.script(run), first is second, third is x, snapshot(x.grad)]

    return Case(f, script)


@program(graphs=2)
def one_tensor_given_twice():
    def f(x, y):
        return (x * y).sin() + x

    x = leaf(4)
    return calls(f, Call(x, x), Call(leaf(4), leaf(4)), Call(x, x))


@program(graphs=0)
def output_without_tensors():
    def f(x):
        return x.dim(), x.dtype, tuple(x.shape), str(x.device), isinstance(x, nn.Parameter)

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def list_argument_extended():
    def f(x, outputs):
        for i in range(3):
            outputs.append(x * i)
        return len(outputs)

    outputs, x = [], leaf(4)

    def script(run):
        count = run(x, outputs)
        go_backward(outputs)
        return [count, snapshot(outputs), snapshot(x.grad)]

    return Case(f, script)


@program(graphs=1)
def dictionary_argument_changed():
    def f(batch):
        batch["y"] = batch.pop("x") * 2
        batch.update(z=batch["y"].sin())
        return batch["z"]

    batch, x = {}, leaf(4)
    batch["x"] = x
    return calls(f, Call(batch), watch=[batch, x])


@program(graphs=1)
def ordered_default_and_double_ended():
    def f(x):
        ordered = OrderedDict(a=x, b=x.sin())
        ordered.move_to_end("a")
        grouped = defaultdict(list)
        for i, value in enumerate(ordered.values()):
            grouped[i % 2].append(value)
        queue = deque(grouped[0] + grouped[1], maxlen=2)
        queue.rotate(1)
        return queue.popleft() - queue.pop(), list(ordered)

    return calls(f, Call(leaf(4)), Call(leaf(4)))


@program(graphs=1)
def sets_and_slices():
    def f(xs):
        kept = {i for i in range(len(xs)) if i % 2 == 0}
        first, *rest = [x for i, x in enumerate(xs) if i in kept]
        return first + sum(rest[::-1])

    return calls(f, Call([leaf(4) for _ in range(5)]))


@program(graphs=1)
def object_with_attributes_changed():
    class Meter:
        def __init__(self):
            self.total = torch.zeros(())
            self.last = None

        def update(self, x):
            self.total = self.total + x.detach().sum()
            self.last = x

    meter, x = Meter(), leaf(4)

    def f(x, meter):
        meter.update(x * 2)
        return meter.total

    def script(run):
        run(x, meter)
        return snapshot([meter.total, meter.last])

    return Case(f, script)


@program(graphs=2)
def numpy_array_as_input():
    def f(x, array):
        return x * torch.from_numpy(array)

    return calls(
        f,
        Call(leaf(4), np.arange(4, dtype=np.float32)),
        Call(leaf(3), np.arange(3, dtype=np.float32)),
    )


@program(graphs=1)
def module_as_argument():
    def f(module, x):
        return module(x).tanh()

    module = nn.Linear(4, 4)
    return calls(f, Call(module, leaf(2, 4)), Call(module, leaf(2, 4)), watch=[module])


@program(graphs=1)
def dictionary_of_losses():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})

    def f(batch):
        hidden = model["body"](batch["x"]).tanh()
        logits = model["head"](hidden)
        losses = {"task": nn.functional.cross_entropy(logits, batch["y"]), "norm": hidden.norm()}
        return {**losses, "total": sum(losses.values())}

    def batch():
        return {"x": leaf(3, 4), "y": torch.randint(2, (3,))}

    return calls(f, Call(batch()), Call(batch()), watch=[model])


@program(graphs=1)
def generator_of_outputs():
    def f(x):
        return tuple(x[i].sin() for i in range(3))

    return calls(f, Call(leaf(3, 4)), Call(leaf(3, 4)))


PROGRAMS = collect(globals())
