"""Programs as Python source: one straight line of operator calls, with a `del` after each last use.

There is no interpreter loop. Programs take their inputs in a list and empty it, so that the caller
holds nothing that the program could free.
"""

import keyword
import linecache
import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plait.errors import GraphError
from plait.executor.observe import Observer, observer_of, operand_names
from plait.graph.schedule import (
    CALL,
    COLLECTIVE,
    CONSTANT,
    ISLAND,
    OBJECT,
    OWN_PART,
    Argument,
    Program,
    Ref,
    Schedule,
    Step,
    refs_in,
    resolve,
)

Runner = Callable[[list], tuple]

# Our own names in a program; no step may be called so.
_INPUTS, _BOX, _BOUND, _RUNNER, _STEPS = "inputs__", "box__", "bound__", "runner__", "steps__"
_OWN = (_INPUTS, _BOX, _BOUND, _RUNNER, _STEPS)


_TOLERANT = {"aten.view.default": Tensor.reshape}
"""PyTorch knows the memory layout of a few results wrongly while it traces (of `softplus_backward`,
say). Eager, which sees the real one, reshapes; so do we. Where a view can be had, it is one."""


@dataclass(frozen=True)
class GroupAtRun:
    """A process group that an axis stands for: its name, and this process's rank in it."""

    name: str
    rank: Any  # a number; where one process computes all ranks, one for each


@dataclass(frozen=True)
class Generated:
    """Source of a program; line i+1 belongs to `steps[i]` (None: no step)."""

    source: str
    line_steps: tuple[Step | None, ...]
    bindings: dict[str, Any]


def load(
    schedule: Schedule,
    observer: Observer | None = None,
    groups: Mapping[str, GroupAtRun] | None = None,
    islands: Mapping[str, Runner] | None = None,
) -> dict[str, Runner]:
    """Make every program of the schedule callable, by name.

    Each takes a list of its inputs, which it empties, and returns a tuple. If a step raises, a note
    on the exception names the step and the user's line. An observer, or that of the context, is
    told of every step. groups: process groups by the axes that collectives name. islands: kernels
    by the names of the islands that they compute; the others run operator by operator.
    """
    observer = observer or observer_of(schedule)
    runners: dict[str, Runner] = dict(islands or {})
    plain = [x.program for name, x in schedule.islands.items() if name not in runners]
    for program in (*plain, *schedule.templates.values(), *schedule.programs.values()):
        generated = generate(program, schedule, observer, groups)
        runners[program.name] = _compile(program, generated, runners)
    return {name: _explaining(runner) for name, runner in runners.items()}


def generate(
    program: Program,
    schedule: Schedule,
    observer: Observer | None = None,
    groups: Mapping[str, GroupAtRun] | None = None,
) -> Generated:
    """Write the source of a program and what its names stand for."""
    writer = _Writer(program, schedule, observer, groups or {})
    return writer.write()


class _Writer:
    def __init__(
        self,
        program: Program,
        schedule: Schedule,
        observer: Observer | None,
        groups: Mapping[str, GroupAtRun],
    ) -> None:
        self.program = program
        self.groups = groups
        self.schedule = schedule
        self.observer = observer
        self.lines: list[str] = []
        self.steps: list[Step | None] = []
        self.bindings: dict[str, Any] = {}
        self.names: dict[int, str] = {}

    def write(self) -> Generated:
        for name in (*self.program.inputs, *(step.name for step in self.program.steps)):
            if not name.isidentifier() or keyword.iskeyword(name) or name.startswith(_OWN):
                raise GraphError(f"{name!r} in program {self.program.name!r} is not a name.")
        self.line(f"def program({_INPUTS}):")
        if self.program.inputs:
            self.line(f"    ({', '.join(self.program.inputs)},) = {_INPUTS}")
            self.line(f"    {_INPUTS}.clear()")
        unused = set(self.program.inputs) - set(self._used())
        if unused:
            self.line(f"    del {', '.join(sorted(unused))}")
        for step in self.program.steps:
            self.step(step)
        results = "".join(f"{self.literal(x)}, " for x in self.program.results)
        self.line(f"    return ({results})")
        return Generated("\n".join(self.lines) + "\n", tuple(self.steps), self.bindings)

    def _used(self) -> list[str]:
        used = refs_in(self.program.results)
        for step in self.program.steps:
            used += refs_in((step.args, dict(step.kwargs)))
        return used

    def line(self, text: str, step: Step | None = None) -> None:
        self.lines.append(text)
        self.steps.append(step)

    def step(self, step: Step) -> None:
        if self.observer is not None:
            operands = "".join(f"{name}, " for name in operand_names(step))
            self.line(f"    {self.bind(self.observer.before)}{self.told(step)}, ({operands}))")
        frees = list(step.frees)
        if step.target.startswith((CALL, ISLAND)):
            given = [name for name in frees if name != step.name]
            box = ", ".join(self.literal(x) for x in step.args)
            self.line(f"    {_BOX} = [{box}]")
            if given:
                self.line(f"    del {', '.join(given)}")
            runner = self.bind_name(step.target)
            self.line(f"    {step.name} = {runner}({_BOX})", step)
            frees = [name for name in frees if name == step.name]
        else:
            self.line(f"    {step.name} = {self.expression(step)}", step)
        if self.observer is not None:
            self.line(f"    {self.bind(self.observer.after)}{self.told(step)}, {step.name})")
        if frees:
            self.line(f"    del {', '.join(frees)}")

    def told(self, step: Step) -> str:
        return f"({self.bind(self.program)}, {self.bind(step)}"

    def expression(self, step: Step) -> str:
        if step.target == CONSTANT:
            return self.bind(self.schedule.constants[str(step.args[0])])
        args = step.args
        if step.target.startswith(COLLECTIVE):
            args = tuple(
                self.groups[x].name if isinstance(x, str) and x in self.groups else x for x in args
            )
        elif step.target == OWN_PART and str(args[-1]) in self.groups:
            group = self.groups[str(args[-1])]
            args = (*args[:-2], group.rank, group.name)
        given = [self.literal(x) for x in args]
        given += [f"{key}={self.literal(x)}" for key, x in step.kwargs]
        if step.target == "getitem":
            return f"{given[0]}[{given[1]}]"
        if step.target.startswith(OBJECT):
            target = self.schedule.objects[step.target.removeprefix(OBJECT)]
        else:
            target = resolve(step.target)
            # The overload's own function: one Python call less for each kernel.
            target = _TOLERANT.get(step.target) or getattr(target, "_op", target)
        return f"{self.bind(target)}({', '.join(given)})"

    def literal(self, x: Argument) -> str:
        if isinstance(x, Ref):
            return x.name
        if x is None or (isinstance(x, bool | int | str) and type(x) in (bool, int, str)):
            return repr(x)
        if type(x) is float and math.isfinite(x):
            return repr(x)
        if isinstance(x, list):
            return f"[{', '.join(self.literal(item) for item in x)}]"
        if type(x) is tuple:
            return f"({''.join(self.literal(item) + ', ' for item in x)})"
        if isinstance(x, dict):
            parts = ", ".join(f"{key!r}: {self.literal(item)}" for key, item in x.items())
            return f"{{{parts}}}"
        if isinstance(x, slice):
            return f"slice({self.literal((x.start, x.stop, x.step))[1:-1].rstrip(', ')})"
        return self.bind(x)

    def bind(self, value: object) -> str:
        name = self.names.get(id(value))
        if name is None:
            name = f"{_BOUND}{len(self.bindings)}"
            self.names[id(value)] = name
            self.bindings[name] = value
        return name

    def bind_name(self, target: str) -> str:
        """A program that may not be compiled yet: bound by `_compile`."""
        name = _RUNNER + "".join(c if c.isalnum() else "_" for c in _called(target))
        self.bindings[name] = target
        return name


def _called(target: str) -> str:
    return target.partition(":")[2]


def _compile(program: Program, generated: Generated, runners: dict[str, Runner]) -> Runner:
    filename = f"<plait {program.name} {id(generated):x}>"
    bindings = {
        name: runners[_called(value)] if name.startswith(_RUNNER) else value
        for name, value in generated.bindings.items()
    }
    bindings[_STEPS] = (program.name, generated.line_steps)
    exec(compile(generated.source, filename, "exec"), bindings)  # our text; names are checked
    lines = generated.source.splitlines(keepends=True)
    linecache.cache[filename] = (len(generated.source), None, lines, filename)
    return bindings["program"]


def _explaining(runner: Runner) -> Runner:
    def run(inputs: list) -> tuple:
        try:
            return runner(inputs)
        except Exception as error:
            _explain(error)
            raise

    return run


def _explain(error: Exception) -> None:
    """Note the step that raised, and the user's line that it came from."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        program, steps = frame.f_globals.get(_STEPS, ("", ()))
        if program and line <= len(steps) and (step := steps[line - 1]) is not None:
            error.add_note(f"raised by {step.name} = {step.target} in the program {program}")
            if step.source:
                error.add_note(f"from {step.source}")
