"""Run a schedule on real tensors, under autograd."""

# pyright: basic
# (autograd.Function is not typed.)

from collections.abc import Sequence

import torch
from torch import Tensor

from plait.executor.codegen import Observer, Runner, load
from plait.graph.graph import Role, Value
from plait.graph.schedule import Schedule


class Runnable:
    """A schedule as a function of its inputs (tensors, in the order of `schedule.inputs`).

    Differentiable: the result carries gradients back through the program `backward`. Once only; a
    gradient of a gradient raises.
    """

    def __init__(self, schedule: Schedule, observer: Observer | None = None) -> None:
        self.schedule = schedule
        runners = load(schedule, observer)
        self.forward = runners["forward"]
        self.backward: Runner | None = runners.get("backward")
        self.num_results = sum(value.role is Role.OUTPUT for value in schedule.outputs)
        self.takes_tangent = {
            int(value.name) for value in schedule.inputs if value.role is Role.TANGENT
        }
        self.tangents = [value for value in schedule.inputs if value.role is Role.TANGENT]
        names = [value.name for value in schedule.inputs]
        self.gradient_of = [
            names.index(value.name) for value in schedule.outputs if value.role is Role.GRADIENT
        ]
        self.saved_inputs = [int(v.name) for v in schedule.saved if v.role is Role.INPUT]
        self.saved_from_inputs = [v.role is Role.INPUT for v in schedule.saved]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs."""
        if self.backward is not None and torch.is_grad_enabled():
            return _Differentiable.apply(self, *inputs)
        with torch.no_grad():
            return self.forward(list(inputs))[: self.num_results]


class _Differentiable(torch.autograd.Function):
    # Each gradient leaves our hands before the next is taken: autograd may keep it without a copy.
    boxed_grads_call = True

    @staticmethod
    def forward(ctx, run: Runnable, *inputs: Tensor) -> tuple[Tensor, ...]:
        yielded = run.forward(list(inputs))
        results = yielded[: run.num_results]
        ctx.run = run
        ctx.num_inputs = len(inputs)
        # Inputs and results are checked for changes by autograd; what is only ours is kept by us,
        # so that the backward can free each value after its last use.
        at = {id(x): i for i, x in enumerate(results)}
        ctx.own = [None if id(x) in at else x for x in yielded[run.num_results :]]
        ctx.from_results = [at.get(id(x)) for x in yielded[run.num_results :]]
        kept = [inputs[i] for i in run.saved_inputs]
        kept += [results[i] for i in ctx.from_results if i is not None]
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(
            *(x for i, x in enumerate(results) if i not in run.takes_tangent)
        )
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        run = ctx.run
        arriving = (
            gradients[0]
            if len(gradients) == 1 and isinstance(gradients[0], list)
            else list(gradients)
        )
        tangents = [_as_traced(arriving[int(value.name)], value) for value in run.tangents]
        del gradients
        arriving.clear()
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        own = list(ctx.own)
        if not keep:
            ctx.own = None
        box = _saved(run, ctx.saved_tensors, own, ctx.from_results)
        own.clear()
        box += tangents
        tangents.clear()
        computed = run.backward(box)
        found: list[Tensor | None] = [None] * ctx.num_inputs
        for i, gradient in zip(run.gradient_of, computed, strict=True):
            found[i] = gradient
        return (None, *found)


def _saved(
    run: Runnable, kept: Sequence[Tensor], own: list[Tensor], from_results: list[int | None]
) -> list[Tensor]:
    inputs, results = iter(kept[: len(run.saved_inputs)]), iter(kept[len(run.saved_inputs) :])
    computed = iter(zip(own, from_results, strict=True))
    box: list[Tensor] = []
    for from_input in run.saved_from_inputs:
        if from_input:
            box.append(next(inputs))
        else:
            value, at = next(computed)
            box.append(value if at is None else next(results))
    return box


def _as_traced(gradient: Tensor | None, value: Value) -> Tensor:
    """The gradient in the form that the program was traced for; zeros where none arrives."""
    if gradient is None:
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    if gradient.stride() != value.stride:
        copy = torch.empty_strided(
            value.shape, value.stride, dtype=gradient.dtype, device=gradient.device
        )
        return copy.copy_(gradient)
    return gradient
