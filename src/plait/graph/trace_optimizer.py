"""What an optimizer does in a step, as a graph that changes parameters and state in place.

`optimizer.step()` is traced on fake tensors, and the kernels that it launches are kept as they are:
nothing is copied, so that memory does not grow. The learning rate is an input of the graph, and so
is what is computed of it; all other settings are constants.
"""

# pyright: basic
# (make_fx and optimizers' states are not typed.)

import inspect
import json
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_aggregate as _map_aggregate
from torch.optim import SGD, Adam, AdamW, Optimizer

from plait.errors import GraphError
from plait.graph.graph import Module, Node, Role, Value, describe
from plait.graph.traced_rate import Rate

# fx types it for what an argument may be, not for what is mapped here.
map_aggregate: Any = _map_aggregate
_RATES = (0.0123456789012345, 0.0234567890123451)
"""Learning rates to trace with. A constant that differs between the two traces comes from them."""
_WITH_FUSED_KERNEL = (Adam, AdamW, SGD)
_NOT_SETTINGS = ("params", "param_names", "lr", "initial_lr")


@dataclass(frozen=True)
class OptimizerGraph:
    """module: changes its inputs in place and returns nothing. settings: see `settings_of`."""

    module: Module
    inputs: tuple[Value, ...]
    settings: str


def trace_optimizers(
    optimizers: Sequence[Optimizer], gradients: Collection[str], *, fuse: bool = False
) -> OptimizerGraph:
    """Trace the step that each of these takes after its first, in turn.

    gradients: names of the parameters that get one. Names are known where the optimizer was made of
    `model.named_parameters()`; else parameters have numbers, as in its state_dict, and each that
    requires a gradient has one.

    The inputs are parameters, gradients, state ("layers.0.weight/exp_avg") and each group's
    learning rate ("group 0/lr").

    fuse: take PyTorch's fused kernel, one for all parameters of a group, where the optimizer has
    one and was not told to use another.

    Raises GraphError for an optimizer that reads values on the host, has hooks or keeps numbers.
    """
    for each in optimizers:
        _check(each)
    traces = [_Trace(optimizers, gradients, rate, fuse=fuse).run() for rate in _RATES]
    texts = [_text(trace.module) for trace in traces]
    if texts[0] != texts[1]:
        raise GraphError(
            f"{_names(optimizers)} uses its learning rate in a way that Plait cannot follow. "
            "Give it as a tensor, lr=torch.tensor(...), or step the optimizer yourself."
        )
    return traces[0]


def parameters_of(optimizers: Sequence[Optimizer]) -> list[tuple[str, Tensor, Optimizer]]:
    """Every parameter, in order, with its name or number and the optimizer that updates it."""
    found: list[tuple[str, Tensor, Optimizer]] = []
    for each in optimizers:
        for group in each.param_groups:
            names = group.get("param_names") or [None] * len(group["params"])
            for name, parameter in zip(names, group["params"], strict=True):
                found.append((name or str(len(found)), parameter, each))
    return found


def settings_of(optimizers: Sequence[Optimizer]) -> str:
    """Everything that is constant in the traced step, as text to compare."""
    settings = [
        [_name(each)]
        + [
            {key: repr(x) for key, x in sorted(group.items()) if key not in _NOT_SETTINGS}
            for group in each.param_groups
        ]
        for each in optimizers
    ]
    return json.dumps(settings)


def can_fuse(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether PyTorch has one kernel for the group's step, and the user has chosen no other."""
    is_free = all(group.get(key) is None for key in ("fused", "foreach"))
    is_plain = not group.get("differentiable") and not group.get("capturable")
    parameters = group["params"]
    return (
        type(optimizer) in _WITH_FUSED_KERNEL
        and is_free
        and is_plain
        and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    )


class _Trace:
    """One trace. rate: what learning rates that are numbers are made of."""

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        gradients: Collection[str],
        rate: float,
        *,
        fuse: bool = False,
    ) -> None:
        self.optimizers, self.rate, self.fuse = optimizers, rate, fuse
        self.mode = FakeTensorMode()
        self.inputs: list[Value] = []
        self.tensors: list[Tensor] = []
        self.known: list[dict[float, Rate]] = []  # of each group, what was made of its rate
        self.named = parameters_of(optimizers)
        self.rates = [group["lr"] for each in optimizers for group in each.param_groups]
        self.has_gradient = {
            id(p)
            for name, p, _ in self.named
            if (p.requires_grad if name.isdigit() else name in gradients)
        }
        if not self.has_gradient:
            raise GraphError(f"no parameter of {_names(optimizers)} has a gradient in this graph.")

    def run(self) -> OptimizerGraph:
        """Take a first step to learn the form of the state, then trace a second."""
        with self.mode:
            parameters = {id(p): self.fake(p) for _, p, _ in self.named}
            gradients = {address: self.fake(parameters[address]) for address in self.has_gradient}
            rates = [self.fake(lr) if isinstance(lr, Tensor) else None for lr in self.rates]
            first = self.stand_ins(parameters, gradients, {}, rates)
            for each in first:
                each.step()
            parameters = {id(p): self.input(Role.PARAMETER, name, p) for name, p, _ in self.named}
            gradients = {
                id(p): self.input(Role.GRADIENT, name, p)
                for name, p, _ in self.named
                if id(p) in self.has_gradient
            }
            states = self.states(first)
            rates = [
                self.input(Role.STATE, f"group {i}/lr", lr) if isinstance(lr, Tensor) else None
                for i, lr in enumerate(self.rates)
            ]
            module = self.trace(parameters, gradients, states, rates)
        for i, known in enumerate(self.known):
            if rates[i] is None:
                self.inputs.append(describe(Role.STATE, f"group {i}/lr", 0.0))
                _make_an_input(module, known, f"group_{i}_lr")
        module.recompile()
        return OptimizerGraph(module, tuple(self.inputs), settings_of(self.optimizers))

    def fake(self, x: Tensor) -> Tensor:
        """A fake of this form; of a meta tensor, one on the CPU, as `capture` does."""
        device = "cpu" if x.device.type == "meta" else x.device
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    def input(self, role: Role, name: str, like: Tensor) -> Tensor:
        fake = self.fake(like)
        self.inputs.append(describe(role, name, fake))
        self.tensors.append(fake)
        return fake

    def stand_ins(
        self,
        parameters: dict[int, Tensor],
        gradients: dict[int, Tensor],
        states: dict[int, dict[str, Tensor]],
        rates: list[Tensor | None],
    ) -> list[Optimizer]:
        """Copies of the optimizers that update these instead, by the address of the real ones."""
        self.known = []
        made = []
        for each in self.optimizers:
            copy = object.__new__(type(each))
            copy.__dict__.update(each.__dict__)
            copy.__dict__.pop("step", None)  # a scheduler of learning rates counts steps there
            copy.param_groups = []
            for group in each.param_groups:
                self.known.append({})
                # Groups have rates of their own, so that each is known by its values.
                odd = Rate(self.rate * (1 + len(self.known) / 7), self.known[-1])
                rate = rates[len(self.known) - 1]
                params = [parameters[id(p)] for p in group["params"]]
                settings = {**group, "params": params, "lr": odd if rate is None else rate}
                if self.fuse and can_fuse(each, group):
                    settings |= {"fused": True, "foreach": False}
                copy.param_groups.append(settings)
            copy.state = defaultdict(dict)
            for address, state in states.items():
                if any(p is parameters[address] for g in copy.param_groups for p in g["params"]):
                    copy.state[parameters[address]] = dict(state)
            made.append(copy)
        for address, gradient in gradients.items():
            parameters[address].grad = gradient
        return made

    def states(self, first: list[Optimizer]) -> dict[int, dict[str, Tensor]]:
        """Inputs in the form of the state after the first step, by parameter."""
        found: dict[int, dict[str, Tensor]] = {}
        for (name, p, each), (_, fake, stand_in) in zip(
            self.named, parameters_of(first), strict=True
        ):
            state = {}
            for key, x in stand_in.state.get(fake, {}).items():
                if not isinstance(x, Tensor):
                    raise GraphError(
                        f"{_name(each)} keeps {key!r} as a {type(x).__name__}, which a program "
                        "would never change. Use one that keeps tensors."
                    )
                state[key] = self.input(Role.STATE, f"{name}/{key}", x)
            if state:
                found[id(p)] = state
        return found

    def trace(
        self,
        parameters: dict[int, Tensor],
        gradients: dict[int, Tensor],
        states: dict[int, dict[str, Tensor]],
        rates: list[Tensor | None],
    ) -> Module:
        def step(*inputs: Tensor) -> tuple[()]:
            for each in self.stand_ins(parameters, gradients, states, rates):
                each.step()
            return ()

        try:
            module: Any = make_fx(step, decomposition_table={})(*self.tensors)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise GraphError(
                f"{_names(self.optimizers)} reads a value on the host ({error.func}), so its step "
                "is not one program. Use fused=True, or capturable=True on a GPU."
            ) from error
        for value, node in zip(self.inputs, module.graph.nodes, strict=False):
            node._rename(f"{value.role.value}_{value.name}")
        for node in reversed(list(module.graph.nodes)):
            if getattr(node.target, "namespace", "") == "profiler":
                module.graph.erase_node(node)
            elif node.op == "get_attr" and isinstance(getattr(module, node.target), FakeTensor):
                raise GraphError(
                    f"{_names(self.optimizers)} makes a tensor of its own in each step."
                )
        return module


def _make_an_input(module: Module, known: dict[float, Rate], name: str) -> None:
    """Let what was made of a rate be computed of a new input, the last."""
    graph = module.graph
    nodes = [node for node in graph.nodes if node.op != "placeholder"]
    with graph.inserting_before(nodes[0]):
        rate = graph.placeholder(name)
        rate.meta["val"] = 0.0
        made: dict[float, Node] = {}

        def compute(x: float) -> Node:
            found = known[x]
            if x not in made:
                operands = () if found.how is None else found.how[1]
                of = tuple(compute(y) if y in known and type(y) is Rate else y for y in operands)
                made[x] = rate if found.how is None else graph.call_function(found.how[0], of)
                made[x].meta["val"] = 0.0
            return made[x]

        for node in nodes:
            node.args, node.kwargs = map_aggregate(
                (node.args, node.kwargs),
                lambda x: compute(x) if type(x) is float and x in known else x,
            )


def _check(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise GraphError(f"an optimizer of torch.optim is needed, got {optimizer!r}.")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise GraphError(f"{_name(optimizer)} has step hooks, which a program cannot run.")
    try:
        inspect.signature(type(optimizer).step).bind(optimizer)
    except TypeError as error:
        raise GraphError(
            f"{_name(optimizer)}.step() is {error}: it runs the model itself, so its step is not "
            "one program after the backward. Step it yourself, around plait.jit."
        ) from None


def _name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _names(optimizers: Sequence[Optimizer]) -> str:
    return " and ".join(type(each).__name__ for each in optimizers)


def _text(module: Module) -> str:
    return "\n".join(f"{n.name} {n.target} {n.args} {n.kwargs}" for n in module.graph.nodes)
