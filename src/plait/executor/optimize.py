"""The program `optimizer` on real tensors: parameters, gradients, the optimizer's own state."""

# pyright: basic
# (States of optimizers are not typed.)

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from plait.errors import GraphError, PlanError
from plait.executor.codegen import Runner
from plait.graph.graph import Role, Value
from plait.graph.schedule import Schedule
from plait.graph.trace_optimizer import parameters_of, settings_of

Optimizers = Optimizer | Sequence[Optimizer] | None


def in_order(optimizer: Optimizers) -> list[Optimizer]:
    """One optimizer, several or none, as a list."""
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)


def check_optimizers(schedule: Schedule, optimizers: Sequence[Optimizer]) -> None:
    """Raise GraphError unless the schedule's program is that of these optimizers."""
    if bool(optimizers) != ("optimizer" in schedule.programs):
        has, given = ("no optimizer", "one") if optimizers else ("an optimizer", "none")
        raise GraphError(
            f"the schedule was compiled with {has}, and {given} is given. "
            "Give the same to plait.compile and to plait.run."
        )
    if optimizers and settings_of(optimizers) != schedule.optimizer_settings:
        raise GraphError(
            "the optimizer is not as it was compiled. Compile again after a change of anything "
            f"but the learning rate. Compiled: {schedule.optimizer_settings}; "
            f"given: {settings_of(optimizers)}."
        )


@torch.no_grad()
def take_step(schedule: Schedule, optimizers: Sequence[Optimizer], runner: Runner) -> None:
    """Update the parameters, and let go of their gradients.

    A first step, which makes the state, is taken by the optimizers themselves. Raises PlanError if
    parameters or gradients are missing or have another form than compiled.
    """
    given = _given(optimizers)
    state_is_made = all(
        (value.role, value.name) in given
        for value in schedule.optimizer_inputs
        if value.role is Role.STATE
    )
    _check(schedule.optimizer_inputs, given, state_is_made=state_is_made)
    if state_is_made:
        runner([given[value.role, value.name] for value in schedule.optimizer_inputs])
    else:
        for each in optimizers:
            each.step()
    for each in optimizers:
        each.zero_grad()
        each._opt_called = True  # type: ignore[attr-defined]  # schedulers of learning rates ask whether a step was taken


def _given(optimizers: Sequence[Optimizer]) -> dict[tuple[Role, str], object]:
    given: dict[tuple[Role, str], object] = {}
    for name, parameter, optimizer in parameters_of(optimizers):
        given[Role.PARAMETER, name] = parameter
        if parameter.grad is not None:
            given[Role.GRADIENT, name] = parameter.grad
        for key, x in optimizer.state.get(parameter, {}).items():
            given[Role.STATE, f"{name}/{key}"] = x
    groups = [group for each in optimizers for group in each.param_groups]
    for i, group in enumerate(groups):
        given[Role.STATE, f"group {i}/lr"] = group["lr"]
    return given


def _check(
    values: Sequence[Value], given: dict[tuple[Role, str], object], *, state_is_made: bool
) -> None:
    gradients = 0
    for value in values:
        x = given.get((value.role, value.name))
        if x is None and value.role is Role.STATE and not state_is_made:
            continue
        what = f"{value.role.value} {value.name}"
        if x is None:
            raise PlanError(
                f"the optimizer's program needs the {what}: there is none. An optimizer made of "
                "model.named_parameters() is compiled for the parameters that have gradients."
            )
        form = (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else ((), None)
        if form != (value.shape, value.dtype):
            raise PlanError(
                f"{what} is {form[1]} {form[0]}, but the schedule was made for {value.dtype} "
                f"{value.shape}. Compile again with the optimizer as it is now."
            )
        gradients += value.role is Role.GRADIENT
    if gradients < sum(role is Role.GRADIENT for role, _ in given):
        raise PlanError(
            "the optimizer has parameters with gradients that its program does not know. "
            "Compile again, or clear the gradients of what is not trained."
        )
