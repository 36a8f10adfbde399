"""A whole training step on forms: what `executor/run.py` does around the programs.

Micro-batches run forward and backward in turn; gradients are kept and added; with fsdp and dp the
parameters are gathered before and the gradients averaged after all of them; then the optimizer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from plait.compiler.shard import shard_shape
from plait.dryrun.forms import Form, Held, form_of
from plait.dryrun.memory_trace import Kind
from plait.dryrun.replay import Replay
from plait.errors import GraphError
from plait.graph.graph import Role, Value
from plait.graph.schedule import Schedule, Step

_EXPANDED = 2
"""Micro-batches that are replayed; those after the second are like it."""
_KINDS = {Role.PARAMETER: Kind.PARAMETERS, Role.BUFFER: Kind.PARAMETERS, Role.INPUT: Kind.INPUTS}


@dataclass
class StepReplay:
    """The state of a run between steps: what is held, by name.

    num_micro_batches: how many are replayed. first_launches: where each training step begins.
    micro_batches: of each step, where each replayed micro-batch begins and the last ends.
    """

    replay: Replay
    parameters: dict[str, Held] = field(default_factory=dict[str, Held])
    gradients: dict[str, Held] = field(default_factory=dict[str, Held])
    state: dict[str, Held] = field(default_factory=dict[str, Held])
    inputs: dict[str, Held] = field(default_factory=dict[str, Held])
    first_launches: list[int] = field(default_factory=list[int])
    micro_batches: list[list[int]] = field(default_factory=list[list[int]])
    saved_bytes: int = 0

    def __post_init__(self) -> None:
        self.schedule: Schedule = self.replay.schedule
        self._make_inputs()

    @property
    def num_micro_batches(self) -> int:
        """How many are replayed; the others are like the last of them."""
        return min(self.schedule.num_micro_batches, _EXPANDED)

    @property
    def repeated(self) -> range:
        """Numbers of the launches of the last step in micro-batches behind the first."""
        _, *behind = self.micro_batches[-1] if self.micro_batches else [0]
        return range(behind[0], behind[-1]) if behind else range(0)

    def step(self) -> None:
        """One training step, or one forward and backward of a model."""
        self.first_launches.append(len(self.replay.launched))
        if not self.schedule.is_step:
            self._differentiable()
            return
        reduces = "reduce_gradients" in self.schedule.programs
        whole = self._whole() if reduces else {}
        whole_gradients: dict[str, Held] = {}
        losses: list[object] = []
        begins: list[int] = []
        for _ in range(self.num_micro_batches):
            begins.append(len(self.replay.launched))
            kept = whole_gradients if reduces else self.gradients
            losses.append(self._micro_batch(self.parameters | whole, kept))
        self.micro_batches.append([*begins, len(self.replay.launched)])
        if reduces:
            self._reduce(whole_gradients)
        if "optimizer" in self.schedule.programs:
            self._optimize()
        for each in (*whole.values(), *losses):
            self.replay.release(each)

    def _make_inputs(self) -> None:
        sharded = "unshard" in self.schedule.programs
        count = self.schedule.num_micro_batches
        for value in self.schedule.inputs:
            if value.role is Role.TANGENT:
                continue
            form = form_of(value)
            num_bytes = form.num_bytes
            if value.role is Role.PARAMETER and sharded:
                shape = shard_shape(value.shape, self.schedule.groups["fsdp"])
                form = Form(shape, _contiguous(shape), form.dtype, form.device)
                num_bytes = form.num_bytes
            elif value.role is Role.INPUT and value.shape:
                num_bytes *= count  # a micro-batch is a view of its part of the batch
            held = self.replay.make(form, _KINDS[value.role], value.name, num_bytes)
            self.replay.hold(held)
            kept = self.inputs if value.role is Role.INPUT else self.parameters
            kept[value.name] = held

    def _given(self, parameters: Mapping[str, Held]) -> list[Held]:
        return [
            (self.inputs if value.role is Role.INPUT else parameters)[value.name]
            for value in self.schedule.inputs
            if value.role is not Role.TANGENT
        ]

    def _whole(self) -> dict[str, Held]:
        names = [v.name for v in self.schedule.inputs if v.role is Role.PARAMETER]
        shards = [self.parameters[name] for name in names]
        if "unshard" in self.schedule.programs:
            self.replay.hold(shards)
            results = self.replay.run("unshard", shards)
            self.replay.mark(results, Kind.COMMUNICATION)
        else:
            results = self.replay.hold(shards)
        return dict(zip(names, _tensors(results), strict=True))

    def _micro_batch(self, parameters: Mapping[str, Held], kept: dict[str, Held]) -> object:
        """Forward, backward, and gradients kept or added; returns the loss, with a reference."""
        replay, schedule = self.replay, self.schedule
        owners = self._given(parameters)
        replay.hold(owners)
        yielded = replay.run("forward", owners)
        results, box = self._results_and_saved(owners, yielded)
        tangents = [v for v in schedule.inputs if v.role is Role.TANGENT]
        loss = next(x for x, v in zip(results, self._results(), strict=True) if _is_output(v))
        share = 1 / schedule.num_micro_batches
        for _ in tangents:
            step = Step(name="tangent", target="aten.full_like.default")
            box.append(replay.launch(step, [loss, share], program="backward"))
        found = self._backward(box)
        replay.mark(found, Kind.GRADIENTS, also=(Kind.TEMPORARIES, Kind.COMMUNICATION))
        names = [v.name for v in schedule.outputs if v.role is Role.GRADIENT]
        for name, gradient in zip(names, _tensors(found), strict=True):
            self._add_gradient(kept, name, gradient)
        replay.hold(loss)
        for each in (*found, *results):
            replay.release(each)
        return loss

    def _results(self) -> list[Value]:
        return [v for v in self.schedule.outputs if v.role is not Role.GRADIENT]

    def _results_and_saved(
        self, owners: Sequence[Held], yielded: Sequence[object]
    ) -> tuple[list[object], list[object]]:
        """Part what the forward yielded; write updates; the saved values, each with a reference."""
        replay = self.replay
        count = len(self._results())
        results, computed = list(yielded[:count]), iter(yielded[count:])
        names = [v.name for v in self.schedule.inputs if v.role is not Role.TANGENT]
        for value, result in zip(self._results(), results, strict=True):
            if value.role is Role.UPDATE:
                step = Step(name=f"update_{value.name}", target="aten.copy_.default")
                owner = owners[names.index(value.name)]
                replay.release(replay.launch(step, [owner, result], program="forward"))
        box: list[object] = []
        seen: set[int] = set()
        self.saved_bytes = 0
        for value in self.schedule.saved:
            if value.role is Role.INPUT:
                box.append(replay.hold(owners[int(value.name)]))
                continue
            each = next(computed)
            replay.mark(each, Kind.ACTIVATIONS, also=(Kind.TEMPORARIES, Kind.COMMUNICATION))
            box.append(each)
            for held in _tensors([each]):
                storage = replay.memory.storages[held.storage]
                if held.storage not in seen and storage.kind is Kind.ACTIVATIONS:
                    self.saved_bytes += storage.num_bytes
                seen.add(held.storage)
        return results, box

    def _backward(self, box: list[object]) -> tuple[object, ...]:
        replay, programs = self.replay, self.schedule.programs
        if "backward_weight" not in programs:
            return replay.run("backward", box)
        # As `executor.run._both`: what was given stays until the weights' part has run.
        given = dict(zip(programs["backward_input"].inputs, box, strict=True))
        replay.hold(box)
        yielded = replay.run("backward_input", box)
        inputs = [v for v in self.schedule.inputs if v.role is not Role.TANGENT]
        roles = {v.name: v.role for v in inputs}
        gradients = [v for v in self.schedule.outputs if v.role is Role.GRADIENT]
        is_weight = [roles[v.name] is Role.PARAMETER for v in gradients]
        kept = yielded[is_weight.count(False) :]
        second = [
            kept[int(name.removeprefix("kept:"))] if name.startswith("kept:") else given[name]
            for name in self.schedule.weight_inputs
        ]
        replay.hold(second)
        weights = iter(replay.run("backward_weight", second))
        first = iter(yielded[: is_weight.count(False)])
        for each in (*given.values(), *kept):
            replay.release(each)
        return tuple(next(weights) if weight else next(first) for weight in is_weight)

    def _add_gradient(self, kept: dict[str, Held], name: str, gradient: Held) -> None:
        known = kept.get(name)
        if known is None:
            self.replay.hold(gradient)
            kept[name] = gradient
        else:
            step = Step(name=f"add_gradient_{name}", target="aten.add_.Tensor")
            self.replay.release(self.replay.launch(step, [known, gradient], program="backward"))

    def _reduce(self, whole: dict[str, Held]) -> None:
        names = list(whole)
        results = self.replay.run("reduce_gradients", list(whole.values()))
        self.replay.mark(results, Kind.GRADIENTS, also=(Kind.TEMPORARIES, Kind.COMMUNICATION))
        for name, gradient in zip(names, _tensors(results), strict=True):
            known = self.gradients.get(name)
            if known is not None:
                step = Step(name=f"add_gradient_{name}", target="aten.add.Tensor")
                total = self.replay.launch(step, [known, gradient], program="reduce_gradients")
                self.replay.mark(total, Kind.GRADIENTS)
                self.replay.release(known)
                self.replay.release(gradient)
                (gradient,) = _tensors([total])
            self.gradients[name] = gradient

    def _optimize(self) -> None:
        """Make the state if it is not there, run the program, and let go of the gradients."""
        given: list[object] = []
        for value in self.schedule.optimizer_inputs:
            if value.role is Role.STATE and value.dtype is None:
                given.append(0.1)  # a learning rate
                continue
            if value.role is Role.STATE and value.name not in self.state:
                made = self.replay.make(form_of(value), Kind.OPTIMIZER, value.name)
                self.replay.hold(made)
                self.state[value.name] = made
            known = {
                Role.PARAMETER: self.parameters,
                Role.GRADIENT: self.gradients,
                Role.STATE: self.state,
            }[value.role]
            given.append(self._of_optimizer(value, known))
        self.replay.hold(given)
        for each in self.replay.run("optimizer", given):
            self.replay.release(each)
        for each in self.gradients.values():
            self.replay.release(each)
        self.gradients.clear()

    def _of_optimizer(self, value: Value, known: Mapping[str, Held]) -> Held:
        """What the optimizer's program takes. Raises GraphError if it numbers its parameters."""
        if value.name not in known:
            raise GraphError(
                f"the optimizer's {value.role.value} {value.name} is none of the model's. Make the "
                "optimizer of model.named_parameters(), or price with plait.price_step."
            )
        return known[value.name]

    def _differentiable(self) -> None:
        """A model under autograd: results are held, gradients returned and kept."""
        replay = self.replay
        owners = self._given(self.parameters)
        replay.hold(owners)
        results, box = self._results_and_saved(owners, replay.run("forward", owners))
        if "backward" in self.schedule.programs or "backward_input" in self.schedule.programs:
            for value in self.schedule.inputs:
                if value.role is Role.TANGENT:
                    tangent = replay.make(form_of(value), Kind.INPUTS, f"tangent {value.name}")
                    box.append(replay.hold(tangent))
            found = self._backward(box)
            replay.mark(found, Kind.GRADIENTS, also=(Kind.TEMPORARIES, Kind.COMMUNICATION))
            for each in found:
                replay.release(each)
        for each in results:
            replay.release(each)


def _is_output(value: Value) -> bool:
    return value.role is Role.OUTPUT


def _tensors(values: object) -> list[Held]:
    assert isinstance(values, (list, tuple))
    return [x for x in values if isinstance(x, Held)]


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))
