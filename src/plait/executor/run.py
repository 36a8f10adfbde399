"""Run a schedule on real tensors: under autograd (`Runnable`), or as a step of training (`run`)."""

# pyright: basic
# (autograd.Function is not typed.)

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch._dynamo
from torch import Tensor, nn
from torch._C._autograd import _get_current_graph_task_keep_graph as keeps_graph
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plait.compiler.absent import without_gradients
from plait.errors import GraphError, PlanError
from plait.executor.agree import check_agreement
from plait.executor.codegen import GroupAtRun, Runner, load
from plait.executor.cuda_graph import Replay, can_replay, keep_apart, record
from plait.executor.islands import compile_islands
from plait.executor.observe import Observer, observer_of
from plait.executor.optimize import Optimizers, check_optimizers, in_order, take_step
from plait.executor.ranks import groups_of, reduce_gradients, whole_parameters
from plait.graph.graph import TENSOR, Role, Value, describe_argument
from plait.graph.schedule import Schedule


def run(
    schedule: Schedule,
    model: nn.Module,
    *inputs: object,
    optimizer: Optimizers = None,
    mesh: DeviceMesh | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Run a schedule with the weights of `model`, which has the form of the captured one.

    Of a step (captured with its loss): runs forward and backward for each micro-batch of the plan,
    adds the gradients to `.grad` and returns the mean loss, detached. Of a model: returns its
    tensors, with gradients through autograd; one tensor is returned as it is.

    optimizer: the one that the schedule was compiled with, or several. Then the step ends with its
    program, on its own state, and the gradients are cleared. mesh: names the axes over which the
    schedule communicates; with fsdp, the model was parted by `executor.ranks.shard_parameters`.

    inputs: those of the capture. Its plain values are part of the program; they may be left out.

    Raises PlanError if inputs or parameters are not those captured, or have another shape or dtype,
    or if the ranks of an axis disagree on the schedule or on weights that each holds whole, and
    GraphError if the optimizer is not the compiled one.
    """
    groups = groups_of(schedule, model, mesh)
    runnable = schedule.loaded
    if not isinstance(runnable, Runnable) or runnable.groups != groups:
        check_agreement(schedule, dict(model.named_parameters()), groups)
        runnable = schedule.loaded = Runnable(schedule, groups=groups)
    return run_loaded(runnable, model, *inputs, optimizer=optimizer)


def run_loaded(
    runnable: "Runnable", model: nn.Module, *inputs: object, optimizer: Optimizers = None
) -> Tensor | tuple[Tensor, ...]:
    """Run what was loaded already, as `run` does."""
    schedule, optimizers = runnable.schedule, in_order(optimizer)
    check_optimizers(schedule, optimizers)
    _check_arguments(schedule.arguments, inputs)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if not schedule.is_step:
        results = runnable(*(local_part(x) for x in _bind(schedule, model, tensors)))
        return results[0] if len(results) == 1 else results
    whole = whole_parameters(schedule, model, runnable.unshard) if runnable.reduce else {}
    losses = [
        _step(runnable, _bind(schedule, model, part, whole))
        for part in _micro_batches(tensors, schedule.num_micro_batches)
    ]
    if runnable.reduce is not None:
        reduce_gradients(schedule, model, whole, runnable.reduce)
    if runnable.optimizer is not None:
        take_step(schedule, optimizers, runnable.optimizer)
    return torch.stack(losses).mean() if len(losses) > 1 else losses[0]


class Runnable:
    """A schedule as a function of its inputs: tensors, in the order of `schedule.inputs`.

    Differentiable once: the results carry gradients back through the program `backward`.
    """

    def __init__(
        self,
        schedule: Schedule,
        observer: Observer | None = None,
        groups: Mapping[str, GroupAtRun] | None = None,
    ) -> None:
        self.islands = compile_islands(schedule)
        schedule.made = tuple(self.islands.lines())
        self.observer = observer or observer_of(schedule)
        runners = load(schedule, self.observer, groups, self.islands.kernels)
        self.schedule = schedule
        self.partial: dict[tuple[int, ...], tuple[Runner, frozenset[int]]] = {}
        self.replay: Replay | None = None
        self.groups = dict(groups or {})
        self.forward, self.backward = runners["forward"], runners.get("backward")
        self.optimizer = runners.get("optimizer")
        self.unshard, self.reduce = runners.get("unshard"), runners.get("reduce_gradients")
        if "backward_weight" in runners:
            self.backward = _both(schedule, runners)
        inputs = [value for value in schedule.inputs if value.role is not Role.TANGENT]
        results = [value for value in schedule.outputs if value.role is not Role.GRADIENT]
        self.num_results = len(results)
        self.outputs = [i for i, value in enumerate(results) if value.role is Role.OUTPUT]
        names = [value.name for value in inputs]
        self.updates = [
            (i, names.index(value.name))
            for i, value in enumerate(results)
            if value.role is Role.UPDATE
        ]
        numbers = {results[i].name: i for i in self.outputs}
        self.tangents = [
            (numbers[value.name], value) for value in schedule.inputs if value.role is Role.TANGENT
        ]
        self.gradient_of = [
            names.index(value.name) for value in schedule.outputs if value.role is Role.GRADIENT
        ]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs; buffers and inputs that the program changes are changed."""
        if self.backward is not None and torch.is_grad_enabled():
            results = _Differentiable.apply(self, *inputs)
        else:
            with torch.no_grad():
                results = self.forward(list(inputs))[: self.num_results]
        if not self.updates:
            return results
        self.update(inputs, results)
        return tuple(results[i] for i in self.outputs)

    def update(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
        """Write the new values of what the program changes."""
        with torch.no_grad():
            for result, at in self.updates:
                inputs[at].copy_(results[result])

    def gradients(self, box: list[Tensor], arriving: list[Tensor | None]) -> tuple[Tensor, ...]:
        """Run `backward`, and empty what it is given, so that each tensor can be freed in time.

        box: what it takes of the forward. arriving: gradients of the results, None where none does.
        """
        tangents = [(arriving[i], value) for i, value in self.tangents]
        absent = tuple(i for i, (x, _) in enumerate(tangents) if x is None)
        run, takes = self.without(absent, len(box))
        box += [_as_traced(x, value) for i, (x, value) in enumerate(tangents) if i in takes]
        del tangents
        arriving.clear()
        return run(box)

    def without(self, absent: tuple[int, ...], num_saved: int) -> tuple[Runner, frozenset[int]]:
        """The backward if no gradient arrives at these tangents, and which it still takes."""
        assert self.backward is not None
        if not absent or "backward" not in self.schedule.programs:
            return self.backward, frozenset(range(len(self.tangents)))
        if absent not in self.partial:
            rest, takes = without_gradients(self.schedule, [num_saved + i for i in absent])
            runners = load(rest, self.observer, self.groups, self.islands.kernels)
            taken = frozenset(i - num_saved for i in takes)
            self.partial[absent] = runners["backward"], taken
        return self.partial[absent]

    def saved(self, inputs: Sequence[Tensor], computed: Sequence[Tensor]) -> list[Tensor]:
        """What `backward` takes, from the inputs and from what `forward` kept."""
        rest = iter(computed)
        return [
            inputs[int(value.name)] if value.role is Role.INPUT else next(rest)
            for value in self.schedule.saved
        ]


# Where a graph breaks, Dynamo would read our own code.
Runnable.__call__ = torch._dynamo.disable(Runnable.__call__)  # type: ignore[method-assign]


def _both(schedule: Schedule, runners: dict[str, Runner]) -> Runner:
    """The two programs of a split backward as one: the weights' part right after the inputs'."""
    names = schedule.programs["backward_input"].inputs
    roles = {value.name: value.role for value in schedule.inputs if value.role is not Role.TANGENT}
    is_weight = [
        roles[value.name] is Role.PARAMETER
        for value in schedule.outputs
        if value.role is Role.GRADIENT
    ]
    num_inputs = is_weight.count(False)

    def backward(box: list[Tensor]) -> tuple[Tensor, ...]:
        given = dict(zip(names, box, strict=True))
        yielded = runners["backward_input"](box)
        kept = yielded[num_inputs:]
        second = [
            kept[int(name.removeprefix("kept:"))] if name.startswith("kept:") else given[name]
            for name in schedule.weight_inputs
        ]
        first, weights = iter(yielded[:num_inputs]), iter(runners["backward_weight"](second))
        return tuple(next(weights) if weight else next(first) for weight in is_weight)

    return backward


class _Differentiable(torch.autograd.Function):
    @staticmethod
    @torch._dynamo.disable
    def forward(ctx, runnable: Runnable, *inputs: Tensor) -> tuple[Tensor, ...]:
        yielded = runnable.forward(list(inputs))
        results, computed = yielded[: runnable.num_results], yielded[runnable.num_results :]
        # Autograd keeps inputs and results, and checks that nobody changes them; the rest is known
        # to nobody else and kept by us, so that the backward frees each value after its last use.
        numbers = {id(x): i for i, x in enumerate(results)}
        ctx.kept_by_autograd = [numbers.get(id(x)) for x in computed]
        ctx.own = [None if id(x) in numbers else x for x in computed]
        ctx.runnable, ctx.num_inputs = runnable, len(inputs)
        ctx.save_for_backward(
            *(inputs[int(v.name)] for v in runnable.schedule.saved if v.role is Role.INPUT),
            *(results[i] for i in ctx.kept_by_autograd if i is not None),
        )
        takes_tangent = {i for i, _ in runnable.tangents}
        ctx.mark_non_differentiable(*(x for i, x in enumerate(results) if i not in takes_tangent))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @torch._dynamo.disable
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        is_graph_wanted = torch.is_grad_enabled()  # with create_graph=True
        box = list(gradients)
        del gradients
        with torch.no_grad():
            found = _Differentiable.gradients(ctx, box)
        if is_graph_wanted:
            found = _Once.apply(torch.zeros((), requires_grad=True), *found)
        return (None, *found)

    @staticmethod
    def gradients(ctx, arriving: list[Tensor | None]) -> list[Tensor | None]:
        """Of each input, or None. arriving: emptied, so each is freed after its last use."""
        runnable = ctx.runnable
        own = list(ctx.own)
        if not keeps_graph():
            ctx.own.clear()
        kept = iter(ctx.saved_tensors)
        inputs = [next(kept) for v in runnable.schedule.saved if v.role is Role.INPUT]
        computed = [
            x if number is None else next(kept)
            for x, number in zip(own, ctx.kept_by_autograd, strict=True)
        ]
        own.clear()
        box = _merge(runnable.schedule.saved, inputs, computed)
        computed.clear()
        found: list[Tensor | None] = [None] * ctx.num_inputs
        yielded = runnable.gradients(box, arriving)
        for i, gradient in zip(runnable.gradient_of, yielded, strict=True):
            found[i] = gradient
        return found


class _Once(torch.autograd.Function):
    """Gradients of which nobody can ask for gradients: without it, they would silently be zero."""

    @staticmethod
    def forward(ctx, _: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.detach() for x in gradients)

    @staticmethod
    def backward(ctx, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise GraphError(
            "a compiled program has no second derivative (create_graph=True, as in a gradient "
            "penalty). Leave what is differentiated twice out of plait.jit and torch.compile."
        )


def _merge(saved: Sequence[Value], inputs: list[Tensor], computed: list[Tensor]) -> list[Tensor]:
    first, second = iter(inputs), iter(computed)
    return [next(first) if value.role is Role.INPUT else next(second) for value in saved]


def _as_traced(gradient: Tensor | None, value: Value) -> Tensor:
    """The gradient in the form that the program was traced for; zeros where none arrives."""
    if gradient is None:
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    if gradient.stride() == value.stride:
        return gradient
    copy = torch.empty_strided(
        value.shape, value.stride, dtype=gradient.dtype, device=gradient.device
    )
    return copy.copy_(gradient)


@torch.no_grad()
def _step(runnable: Runnable, owners: list[Tensor]) -> Tensor:
    """Forward, backward, and gradients added to those that are there; returns the mean loss."""
    inputs = [local_part(x) for x in owners]
    if can_replay(runnable.schedule):
        loss, gradients = _replayed(runnable, inputs)
    else:
        loss, gradients = _launched(runnable, inputs)
    for i, gradient in zip(runnable.gradient_of, gradients, strict=True):
        _add_gradient(owners[i], gradient)
    return loss


def _replayed(runnable: Runnable, inputs: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """One replay of the recorded step; it is recorded anew if a parameter has moved."""
    is_fixed = [value.role is not Role.INPUT for value in runnable.schedule.inputs]
    is_fixed = is_fixed[: len(inputs)]
    if runnable.replay is None or not runnable.replay.fits(inputs, is_fixed):
        runnable.replay = record(lambda x: _launched(runnable, list(x)), inputs, is_fixed)
    keep_apart(inputs, runnable.replay.gradients)
    return runnable.replay.run(inputs, is_fixed), runnable.replay.gradients


def _launched(runnable: Runnable, inputs: list[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Loss and gradients, operator by operator."""
    yielded = runnable.forward(list(inputs))
    results, computed = yielded[: runnable.num_results], list(yielded[runnable.num_results :])
    del yielded
    (loss,) = (results[i] for i in runnable.outputs)
    runnable.update(inputs, results)
    if runnable.backward is None:
        raise GraphError("the captured step has no gradients: no parameter requires one.")
    share = 1 / runnable.schedule.num_micro_batches
    box = runnable.saved(inputs, computed)
    computed.clear()
    box += [torch.full_like(loss, share) for _ in runnable.tangents]
    return loss, runnable.backward(box)


def _micro_batches(tensors: Sequence[Tensor], count: int) -> Iterator[list[Tensor]]:
    if count == 1:
        yield list(tensors)
        return
    parts = [x.chunk(count) if x.dim() else (x,) * count for x in tensors]
    for i in range(count):
        yield [part[i] for part in parts]


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def _add_gradient(owner: Tensor, gradient: Tensor) -> None:
    if isinstance(owner, DTensor):
        gradient = DTensor.from_local(
            gradient,
            owner.device_mesh,
            owner.placements,
            run_check=False,
            shape=owner.shape,
            stride=owner.stride(),
        )
    if owner.grad is None:
        owner.grad = gradient
    else:
        owner.grad += gradient


def _check_arguments(captured: tuple[str, ...] | None, inputs: Sequence[object]) -> None:
    """Raise PlanError if these are not the inputs of the capture, with or without plain values."""
    given = tuple(describe_argument(x) for x in inputs)
    if captured is None or given in (captured, tuple(x for x in captured if x == TENSOR)):
        return
    if len(given) == len(captured):
        i = next(i for i, (x, y) in enumerate(zip(given, captured, strict=True)) if x != y)
        if captured[i] == TENSOR:
            raise PlanError(
                f"input {i} is {given[i]}, which is not a tensor: the schedule was captured "
                "with one there."
            )
        raise PlanError(
            f"input {i} is {given[i]}, but the schedule was captured with {captured[i]}, which is "
            "part of its program. Capture again for another value."
        )
    raise PlanError(
        f"the schedule was captured with these inputs beside the model: {_list(captured)}. "
        f"Given: {_list(given)}."
    )


def _list(arguments: Sequence[str]) -> str:
    return ", ".join(arguments) or "none"


def _bind(
    schedule: Schedule,
    model: nn.Module,
    tensors: Sequence[Tensor],
    whole: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """The inputs of the schedule, in order, each of the captured form. whole: parameters."""
    named: dict[tuple[Role, str], Tensor] = {(Role.INPUT, str(i)): x for i, x in enumerate(tensors)}
    named |= {(Role.PARAMETER, name): x for name, x in model.named_parameters()}
    named |= {(Role.PARAMETER, name): x for name, x in (whole or {}).items()}
    named |= {(Role.BUFFER, name): x for name, x in model.named_buffers()}
    bound = []
    for value in schedule.inputs:
        if value.role is Role.TANGENT:
            continue
        found = named.get((value.role, value.name))
        if found is None:
            raise PlanError(f"the schedule needs the {value.role.value} {value.name}: none given.")
        local = local_part(found)
        if tuple(local.shape) != value.shape or local.dtype != value.dtype:
            raise PlanError(
                f"{value.role.value} {value.name} is {local.dtype} {tuple(local.shape)}, "
                f"but the schedule was made for {value.dtype} {value.shape}. "
                "Capture again with inputs of this form."
            )
        bound.append(found)
    return bound
