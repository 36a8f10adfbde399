"""Look into running programs: who is told of every step, and how whole scripts are watched.

`codegen.load` generates observed programs for an `Observer`; `observing` gives one to every
schedule that is loaded meanwhile.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

from torch import Tensor

from plait.graph.place import Call, Place, call_made_by, input_names
from plait.graph.schedule import (
    CALL,
    CONSTANT,
    GETITEM,
    ISLAND,
    OBJECT,
    PYTHON,
    Program,
    Schedule,
    Step,
    refs_in,
    resolve,
)


class Observer(Protocol):
    """Is told of every step, where a program is generated to be observed."""

    def before(self, program: Program, step: Step, operands: tuple[object, ...]) -> None:
        """Before the step is launched, with its `operand_names`; calls come before their steps."""
        ...

    def after(self, program: Program, step: Step, value: object) -> None:
        """After it, with what it returned."""
        ...


MakeObserver = Callable[[Schedule], Observer | None]
_MAKE_OBSERVER: ContextVar[MakeObserver | None] = ContextVar("make_observer", default=None)


@contextmanager
def observing(make: MakeObserver) -> Iterator[None]:
    """Observe every schedule that is loaded in this context (of this thread).

    make: returns the observer of a schedule, or None. A program loaded here stays observed.
    """
    token = _MAKE_OBSERVER.set(make)
    try:
        yield
    finally:
        _MAKE_OBSERVER.reset(token)


def observer_of(schedule: Schedule) -> Observer | None:
    """The observer that the context asks for."""
    make = _MAKE_OBSERVER.get()
    return None if make is None else make(schedule)


def operand_names(step: Step) -> tuple[str, ...]:
    """Names of the values that a step takes, each once, in order."""
    return tuple(dict.fromkeys(refs_in((step.args, dict(step.kwargs)))))


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in a step's value, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return (
        [x for item in value for x in tensors_in(item)] if isinstance(value, list | tuple) else []
    )


@cache
def writes_in_place(target: str) -> bool:
    """Whether an operator of this name overwrites an operand."""
    if target.startswith((CALL, ISLAND, OBJECT, PYTHON)) or target in (GETITEM, CONSTANT):
        return False
    schema = getattr(resolve(target), "_schema", None)
    return schema is not None and schema.is_mutable


@dataclass(frozen=True, kw_only=True)
class Sighting:
    """A step that has run. run: which run of its program this is, from 1.

    operands: by name, as they were before the step; of a call none are kept, so that the call can
    free them. input_names: what
    the user calls the inputs of the outermost program.
    """

    graph: str
    run: int
    place: Place
    program: Program
    operands: dict[str, object]
    value: object
    input_names: dict[str, str]

    def __str__(self) -> str:
        """What it is, and where it stands."""
        lines = [
            f"{self.place.name} = {self.place.step.target}",
            f"  in {self.place.where}, run {self.run}" + (f", of {self.graph}" * bool(self.graph)),
        ]
        if self.place.step.source:
            lines.append(f"  from {self.place.step.source}")
        return "\n".join(lines)


Watch = Callable[[Sighting], None]


def makes_values(sighting: Sighting) -> bool:
    """Whether it is an operator that gives its result values: `empty` and its kind do not."""
    return sighting.place.is_operator and "empty" not in sighting.place.step.target


@dataclass
class Lookout:
    """An observer that knows where it is: each watch is called after every step.

    graph: how the schedule is called in what is printed. copies: whether operands are copied that
    the step overwrites.
    """

    schedule: Schedule
    watches: Sequence[Watch] = ()
    arrivals: Sequence[Watch] = ()
    graph: str = ""
    copies: bool = True
    calls: list[Call] = field(default_factory=list)
    outermost: str = ""
    runs: dict[str, int] = field(default_factory=dict)
    operands: dict[str, object] = field(default_factory=dict)
    known_calls: dict[tuple[str, str], Call] = field(default_factory=dict)
    known_names: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.input_names = input_names(self.schedule)

    def before(self, program: Program, step: Step, operands: tuple[object, ...]) -> None:
        """Follow calls, and keep what the step takes until it has run."""
        self._return_to(program)
        if not self.calls:
            self.outermost = program.name
            if step is program.steps[0]:
                self.runs[program.name] = self.runs.get(program.name, 0) + 1
        named = dict(zip(self._operand_names(step), operands, strict=True))
        for arrival in self.arrivals:
            arrival(self._sighting(program, step, named, None))
        self.operands = {}
        if step.target.startswith(CALL):
            self.calls.append(self._call(program, step))
        else:
            copied = self.copies and writes_in_place(step.target)
            self.operands = {name: _copy(x) for name, x in named.items()} if copied else named

    def after(self, program: Program, step: Step, value: object) -> None:
        """Show the step to every watch."""
        self._return_to(program)
        sighting = self._sighting(program, step, self.operands, value)
        self.operands = {}
        for watch in self.watches:
            watch(sighting)

    def _sighting(
        self, program: Program, step: Step, operands: dict[str, object], value: object
    ) -> Sighting:
        return Sighting(
            graph=self.graph,
            run=self.runs[self.outermost],
            place=Place(program=self.outermost, calls=tuple(self.calls), step=step),
            program=program,
            operands=operands,
            value=value,
            input_names=self.input_names,
        )

    def _call(self, program: Program, step: Step) -> Call:
        at = (program.name, step.name)
        if at not in self.known_calls:
            self.known_calls[at] = call_made_by(step, program, self.schedule)
        return self.known_calls[at]

    def _operand_names(self, step: Step) -> tuple[str, ...]:
        # By identity: the schedule keeps its steps alive.
        if id(step) not in self.known_names:
            self.known_names[id(step)] = operand_names(step)
        return self.known_names[id(step)]

    def _return_to(self, program: Program) -> None:
        """Leave the calls that have ended, or were ended by an exception."""
        while self.calls and self.calls[-1].template != program.name:
            self.calls.pop()


def _copy(x: object) -> object:
    return x.detach().clone() if isinstance(x, Tensor) else x
