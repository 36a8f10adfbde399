"""The schedule: named programs of ordered steps, what the executor runs and the dry run prices.

A schedule holds no weights. Its steps name operators, so it can be stored as JSON and bound again,
on any machine, to a model of its shape.
"""

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch._ops import OpOverload

from plait.errors import GraphError
from plait.graph.graph import Value
from plait.graph.note import Note


@dataclass(frozen=True)
class Ref:
    """The value of that name: an input of the program or the result of an earlier step."""

    name: str


Argument = object
"""A Ref, a constant (number, string, dtype, device, None), or a list, tuple or dict of them."""

GETITEM = "getitem"
CONSTANT = "constant"
CALL = "call:"
PYTHON = "python:"
OBJECT = "object:"
ISLAND = "island:"
COLLECTIVE = "_c10d_functional."
OWN_PART = "plait.own_part.default"
"""Its last arguments are the rank and the group, which a schedule learns when it is run."""

_PYTHON_MODULES = {"operator": operator, "torch": torch, "math": math}
_SIZE_FUNCTION = re.compile(
    r"operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge)|torch\.sym_\w+|math\.\w+"
)
"""What Python itself may do in a schedule: arithmetic of sizes."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operator to launch.

    target: "aten.mm.default"; "call:<program>"; "island:<name>" (its operators run as one kernel
    and yield a tuple); "getitem"; "constant" (of the schedule);
    "python:operator.mul" (sizes); "object:<name>" (something that cannot be stored).
    frees: values that nobody needs after this step. source: the user's line that it came from.
    """

    name: str
    target: str
    args: tuple[Argument, ...] = ()
    kwargs: tuple[tuple[str, Argument], ...] = ()
    frees: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Program:
    """Steps in order. results: what it returns, Refs and constants.

    sums: steps that add two values of one form, as autograd does with gradients.
    """

    name: str
    inputs: tuple[str, ...]
    results: tuple[Argument, ...]
    steps: tuple[Step, ...]
    sums: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class IslandProgram:
    """Operators that run as one kernel, which the executor has made when it loads the schedule.

    takes: the forms of the program's inputs. mode: how the kernel is made, "" or "max-autotune".
    """

    program: Program
    takes: tuple[Value, ...]
    mode: str = ""

    @property
    def num_operators(self) -> int:
        """Operators in it; views and parts of tuples are counted too."""
        return sum(step.target != GETITEM for step in self.program.steps)


@dataclass
class Schedule:
    """Programs that run in turn, and the programs of templates that they call.

    inputs and outputs describe the edge of the whole; saved is what the program `backward` takes
    from `forward`: an INPUT among them is the input of that number. With a split backward the
    programs are `backward_input` and `backward_weight`; weight_inputs is what the second takes: an
    input of the first by name, or "kept:<i>", its i-th result after the gradients. constants are
    small tensors of the code itself; objects are callables without a name, with which a schedule
    cannot be stored. certificates: what was proven of the pieces that were split. groups: the axes
    that collectives name, and their sizes. optimizer_inputs describe what the program `optimizer`
    takes and changes in place, optimizer_settings all that is constant in it. notes: what the
    passes did, and what they could not do. islands: by name, each once. arguments: what the user's
    function was captured with, in its order (`describe_argument`); None where nobody calls it so.
    """

    level: str
    programs: dict[str, Program] = field(default_factory=dict[str, Program])
    templates: dict[str, Program] = field(default_factory=dict[str, Program])
    inputs: tuple[Value, ...] = ()
    outputs: tuple[Value, ...] = ()
    saved: tuple[Value, ...] = ()
    weight_inputs: tuple[str, ...] = ()
    constants: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    objects: dict[str, Callable[..., object]] = field(
        default_factory=dict[str, Callable[..., object]]
    )
    is_step: bool = False
    num_micro_batches: int = 1
    numerics: str = "fast"
    optimizer_inputs: tuple[Value, ...] = ()
    optimizer_settings: str = ""
    notes: tuple[Note, ...] = ()
    certificates: dict[str, str] = field(default_factory=dict[str, str])
    groups: dict[str, int] = field(default_factory=dict[str, int])
    islands: dict[str, IslandProgram] = field(default_factory=dict[str, IslandProgram])
    arguments: tuple[str, ...] | None = None
    made: tuple[str, ...] = field(default=(), repr=False, compare=False)  # said when it was loaded
    loaded: object = field(default=None, repr=False, compare=False)  # the executor's own

    def report(self) -> str:
        """What it runs, and what the passes did and could not do, as text."""
        programs = ", ".join(self.programs)
        first = (
            f"level {self.level}, {self.numerics} numerics, {self.num_steps} operators: {programs}"
        )
        parts = (*self.island_lines(), *self.made, *self.notes, *self.certificate_lines())
        return "\n".join([first, *map(str, parts)])

    def certificate_lines(self) -> list[str]:
        """Of each piece that was split, what was proven of it; `certificates` has all of it."""
        found: list[str] = []
        for name, text in self.certificates.items():
            heads = (line for line in text.splitlines() if not line.startswith(" "))
            found.append(f"certificate of {name}: {'; '.join(heads)}")
        return found

    def island_lines(self) -> list[str]:
        """What is fused, as text: islands, how many of them differ, and the operators in them."""
        if not self.islands:
            return []
        counts = self.count_islands()
        sizes = {name: found.num_operators for name, found in self.islands.items()}
        operators = sum(sizes[name] * count for name, count in counts.items())
        total = sum(counts.values())
        return [f"{total} islands, {len(counts)} of them distinct, hold {operators} operators"]

    def count_islands(self) -> Counter[str]:
        """How often each island runs when each program runs once."""
        found: Counter[str] = Counter()
        for program in self.programs.values():
            self._count_islands(program, found)
        return found

    def _count_islands(self, program: Program, found: Counter[str]) -> None:
        for step in program.steps:
            if step.target.startswith(CALL):
                self._count_islands(self.program(step.target.removeprefix(CALL)), found)
            elif step.target.startswith(ISLAND):
                found[step.target.removeprefix(ISLAND)] += 1

    def program(self, name: str) -> Program:
        """The program or template program of that name."""
        return self.programs[name] if name in self.programs else self.templates[name]

    @property
    def num_steps(self) -> int:
        """Operators launched when each program runs once."""
        return sum(self._num_steps(program) for program in self.programs.values())

    def _num_steps(self, program: Program) -> int:
        count = 0
        for step in program.steps:
            if step.target.startswith(CALL):
                count += self._num_steps(self.program(step.target.removeprefix(CALL)))
            else:
                count += step.target not in (GETITEM, CONSTANT)
        return count


def name_of(target: object) -> str | None:
    """The name under which a step stores a target; None if it has none."""
    if isinstance(target, OpOverload):
        return str(cast("object", target))
    if target is operator.getitem:
        return GETITEM
    module = getattr(target, "__module__", None)
    name = getattr(target, "__name__", "")
    module = {"_operator": "operator"}.get(str(module), str(module))
    is_known = _SIZE_FUNCTION.fullmatch(f"{module}.{name}") is not None
    if is_known and getattr(_PYTHON_MODULES[module], name, None) is target:
        return f"{PYTHON}{module}.{name}"
    return None


def resolve(target: str) -> Callable[..., object]:
    """The operator of that name. Raises GraphError if there is none that a schedule may call."""
    if target == GETITEM:
        return operator.getitem
    if target.startswith(PYTHON):
        if _SIZE_FUNCTION.fullmatch(target.removeprefix(PYTHON)) is None:
            raise GraphError(f"a schedule may not call {target.removeprefix(PYTHON)}.")
        module, _, name = target.removeprefix(PYTHON).partition(".")
        return cast("Callable[..., object]", getattr(_PYTHON_MODULES[module], name))
    try:
        namespace, name, overload = target.split(".")
        found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except (ValueError, AttributeError) as error:
        raise GraphError(
            f"there is no operator {target!r} in torch {torch.__version__}."
        ) from error
    return cast("Callable[..., object]", found)


def interpreted(program: Program) -> Callable[..., tuple[object, ...]]:
    """A function that runs a program of operators alone, as that of an island, one by one."""

    def run(*operands: object) -> tuple[object, ...]:
        known: dict[str, object] = dict(zip(program.inputs, operands, strict=True))

        def value(argument: Argument) -> Any:
            return map_refs(argument, lambda ref: known[ref.name])

        for step in program.steps:
            kwargs: dict[str, Any] = {name: value(argument) for name, argument in step.kwargs}
            known[step.name] = resolve(step.target)(*value(step.args), **kwargs)
        return cast("tuple[object, ...]", value(program.results))

    return run


def map_refs(argument: Argument, replace: Callable[[Ref], object]) -> object:
    """The argument with something else in the place of each Ref."""
    if isinstance(argument, Ref):
        return replace(argument)
    if isinstance(argument, list):
        return [map_refs(item, replace) for item in cast("list[Argument]", argument)]
    if isinstance(argument, tuple):
        items = cast("tuple[Argument, ...]", argument)
        return tuple(map_refs(item, replace) for item in items)
    if isinstance(argument, Mapping):
        parts = cast("Mapping[str, Argument]", argument).items()
        return {key: map_refs(item, replace) for key, item in parts}
    if isinstance(argument, slice):
        bounds = cast("slice[Argument, Argument, Argument]", argument)
        return slice(*(map_refs(x, replace) for x in (bounds.start, bounds.stop, bounds.step)))
    return argument


def refs_in(argument: Argument) -> list[str]:
    """Names of the values in an argument, in order."""
    if isinstance(argument, Ref):
        return [argument.name]
    if isinstance(argument, (list, tuple)):
        items = cast("list[Argument]", argument)
        return [name for item in items for name in refs_in(item)]
    if isinstance(argument, Mapping):
        parts = cast("Mapping[str, Argument]", argument).values()
        return [name for item in parts for name in refs_in(item)]
    if isinstance(argument, slice):
        bounds = cast("slice[Argument, Argument, Argument]", argument)
        return refs_in((bounds.start, bounds.stop, bounds.step))
    return []
