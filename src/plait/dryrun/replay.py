"""A schedule on forms instead of tensors: what is launched, and what memory lives meanwhile.

It does what `executor/codegen.py` writes and `executor/run.py` does around it: the same calls, the
same references given away, the same `del`s. So memory is freed where the executor frees it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from plait.dryrun.forms import Form, Forms, Held, Made, Outcome, held_in, key_of
from plait.dryrun.memory_trace import Kind, MemoryTrace, Storage
from plait.graph.place import Call, call_made_by, input_names
from plait.graph.schedule import (
    CALL,
    CONSTANT,
    GETITEM,
    PYTHON,
    Argument,
    Program,
    Schedule,
    Step,
    map_refs,
    refs_in,
    resolve,
)

_NONE: tuple[()] = ()


@dataclass(slots=True)
class Launched:
    """One operator as it was launched. run: which run of its program. group: of a collective.

    depends_on: numbers of launches whose results it takes.
    """

    number: int
    step: Step
    program: str
    calls: tuple[Call, ...]
    run: int
    outcome: Outcome
    group: str
    depends_on: tuple[int, ...]


@dataclass
class Replay:
    """Runs programs of one schedule. References to memory are counted as Python counts them."""

    schedule: Schedule
    forms: Forms
    memory: MemoryTrace = field(default_factory=MemoryTrace)
    launched: list[Launched] = field(default_factory=list[Launched])

    def __post_init__(self) -> None:
        self.references: list[int] = []
        self.writer: list[int] = []  # of each storage, the launch that wrote it last
        self.constants: dict[str, Held] = {}
        self.names = input_names(self.schedule)
        self.call_of: dict[tuple[str, str], Call] = {}
        self.run_number = 0
        # Of each program and forms of its inputs: what each of its steps does, and its group.
        self.learnt: dict[object, dict[str, tuple[Outcome, str]]] = {}
        self.operands_of: dict[int, list[str]] = {}  # by identity: the schedule keeps its steps
        self.unused = {
            program.name: _unused(program)
            for program in (*self.schedule.programs.values(), *self.schedule.templates.values())
        }

    @property
    def moment(self) -> int:
        """The number of the operator launched last."""
        return len(self.launched) - 1

    def make(self, form: Form, kind: Kind, name: str, num_bytes: int | None = None) -> Held:
        """Memory that is there without an operator; whoever asks owns the reference."""
        size = form.num_bytes if num_bytes is None else num_bytes
        storage = Storage(size, kind, self.moment, name)
        return Held(form, self._allocate(storage, -1))

    def hold(self, value: object) -> object:
        """Count one more reference to all tensors in a value."""
        for each in held_in(value):
            self.references[each.storage] += 1
        return value

    def release(self, value: object) -> None:
        """Give a reference back; memory that nobody refers to is freed."""
        for each in held_in(value):
            self.references[each.storage] -= 1
            if not self.references[each.storage]:
                self.memory.free(each.storage, self.moment)

    def mark(
        self, value: object, kind: Kind, *, also: Sequence[Kind] = (Kind.TEMPORARIES,)
    ) -> None:
        """Say what the memory of a value is for, where it is one of `also` so far."""
        for each in held_in(value):
            storage = self.memory.storages[each.storage]
            if storage.kind in also:
                storage.kind = kind

    def run(self, name: str, given: Sequence[object]) -> tuple[object, ...]:
        """Run a program; takes over the references to `given`, and gives those to the results."""
        self.run_number += 1
        return self._run(self.schedule.programs[name], given, name, _NONE)

    def launch(
        self,
        step: Step,
        args: Sequence[object],
        kwargs: Mapping[str, object] = {},
        *,
        program: str = "",
    ) -> object:
        """Launch one operator; the caller owns the references to the result."""
        learnt = self._learn(step, args, kwargs)
        return self._launch(step, learnt, held_in(args) + held_in(kwargs), program, _NONE)

    def _learn(
        self, step: Step, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> tuple[Outcome, str]:
        outcome = self.forms.outcome(step.target, args, kwargs)
        return outcome, _group(args) if outcome.collective is not None else ""

    def _launch(
        self,
        step: Step,
        learnt: tuple[Outcome, str],
        operands: Sequence[Held],
        program: str,
        calls: tuple[Call, ...],
    ) -> object:
        outcome, group = learnt
        number = len(self.launched)
        before = {self.writer[each.storage] for each in operands}
        before.discard(-1)
        self.launched.append(
            Launched(
                number=number,
                step=step,
                program=program,
                calls=calls,
                run=self.run_number,
                outcome=outcome,
                group=group,
                depends_on=tuple(sorted(before)),
            )
        )
        kind = Kind.TEMPORARIES if outcome.collective is None else Kind.COMMUNICATION
        sizes = outcome.new_bytes
        new = [self._allocate(_storage(step, size, kind, number), number) for size in sizes]
        if outcome.workspace_bytes:
            scratch = _storage(step, outcome.workspace_bytes, Kind.WORKSPACE, number)
            self.memory.free(self._allocate(scratch, number), number)
        for i in outcome.written:
            self.writer[operands[i].storage] = number
        return self.hold(_placed(outcome.result, new, operands))

    def _run(
        self, program: Program, given: Sequence[object], outermost: str, calls: tuple[Call, ...]
    ) -> tuple[object, ...]:
        frame: dict[str, object] = dict(zip(program.inputs, given, strict=True))
        learnt = self.learnt.setdefault((program.name, *map(key_of, given)), {})
        for name in self.unused[program.name]:
            self.release(frame.pop(name))
        for step in program.steps:
            frees = step.frees
            if step.target.startswith(CALL):
                args = [self.hold(_value(x, frame)) for x in step.args]
                for name in frees:
                    if name != step.name:
                        self.release(frame.pop(name))
                call = self._call(step, program)
                inner = self.schedule.program(call.template)
                frame[step.name] = self._run(inner, args, outermost, (*calls, call))
                frees = tuple(name for name in frees if name == step.name)
            else:
                frame[step.name] = self._step(step, frame, learnt, outermost, calls)
            for name in frees:
                self.release(frame.pop(name))
        results = tuple(self.hold(_value(x, frame)) for x in program.results)
        for value in frame.values():
            self.release(value)
        return results

    def _step(
        self,
        step: Step,
        frame: Mapping[str, object],
        learnt: dict[str, tuple[Outcome, str]],
        outermost: str,
        calls: tuple[Call, ...],
    ) -> object:
        if step.target == GETITEM:
            container = cast("Sequence[object]", _value(step.args[0], frame))
            return self.hold(container[cast("int", step.args[1])])
        if step.target == CONSTANT:
            return self.hold(self._constant(str(step.args[0])))
        known = learnt.get(step.name)
        if known is None:
            args = [_value(x, frame) for x in step.args]
            kwargs = {name: _value(x, frame) for name, x in step.kwargs}
            if step.target.startswith(PYTHON):
                return resolve(step.target)(*args, **kwargs)
            known = learnt[step.name] = self._learn(step, args, kwargs)
        operands = [each for name in self._operands(step) for each in held_in(frame[name])]
        return self._launch(step, known, operands, outermost, calls)

    def _operands(self, step: Step) -> list[str]:
        """Names of what a step takes, in the order in which an `Outcome` numbers them."""
        found = self.operands_of.get(id(step))
        if found is None:
            found = self.operands_of[id(step)] = refs_in((step.args, dict(step.kwargs)))
        return found

    def _allocate(self, storage: Storage, writer: int) -> int:
        self.references.append(0)
        self.writer.append(writer)
        return self.memory.allocate(storage)

    def _constant(self, name: str) -> Held:
        if name not in self.constants:
            x = self.schedule.constants[name]
            form = Form(tuple(x.shape), tuple(x.stride()), x.dtype, str(x.device))
            self.constants[name] = self.make(form, Kind.INPUTS, name)
            self.hold(self.constants[name])  # the schedule's own reference
        return self.constants[name]

    def _call(self, step: Step, program: Program) -> Call:
        at = (program.name, step.name)
        if at not in self.call_of:
            self.call_of[at] = call_made_by(step, program, self.schedule, self.names)
        return self.call_of[at]


def _group(args: Sequence[object]) -> str:
    """The axis that a collective names: its last text."""
    return next((x for x in reversed(args) if isinstance(x, str)), "")


def _storage(step: Step, num_bytes: int, kind: Kind, moment: int) -> Storage:
    return Storage(num_bytes, kind, moment, step.name, step.target, step.source)


def _unused(program: Program) -> list[str]:
    used = set(refs_in(program.results))
    for step in program.steps:
        used.update(refs_in((step.args, dict(step.kwargs))))
    return [name for name in program.inputs if name not in used]


def _value(x: Argument, frame: Mapping[str, object]) -> object:
    return map_refs(x, lambda ref: frame[ref.name])


def _placed(result: object, new: Sequence[int], operands: Sequence[Held]) -> object:
    """A described result in the memory of this launch."""
    if isinstance(result, Made):
        storage = new[result.number] if result.is_new else operands[result.number].storage
        return Held(result.form, storage)
    if isinstance(result, (list, tuple)):
        items = cast("Sequence[object]", result)
        return tuple(_placed(item, new, operands) for item in items)
    return result
