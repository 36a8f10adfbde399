"""What an operator makes of the forms of its operands, learnt once for each form on fake tensors.

A deep model repeats a few operators on a few forms: after the first layer everything is known.
"""

# pyright: basic
# (Fake tensors are not typed.)

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as _registers_fake_collectives  # noqa: F401
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

import plait.graph.exchange as _registers_own_part  # noqa: F401
from plait.cost.collectives import Collective, collective_of, waits
from plait.cost.operations import Cost, cost_of, has_formula
from plait.errors import GraphError
from plait.graph.graph import Value
from plait.graph.schedule import ISLAND, OBJECT, Schedule, interpreted, resolve

_KNOWN_NAMESPACES = ("aten", "plait", "prims", "_c10d_functional", "c10d_functional", "c10d")
_SLICE = "aten.slice.Tensor"


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @property
    def num_bytes(self) -> int:
        """What it holds in memory: a dim that is expanded counts once."""
        count = 1
        for size, step in zip(self.shape, self.stride, strict=True):
            count *= size if step or not size else 1
        return count * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor in a replay: its form, and the number of the memory in which it lies."""

    form: Form
    storage: int


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor that an operator yields: in new memory, or in that of an operand; which one."""

    form: Form
    number: int
    is_new: bool


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one operator does to operands of given forms.

    result: `Made`s, alone or in tuples and lists, and constants. new_bytes: sizes of the memory
    that it allocates for them. workspace_bytes: what its kernel allocates and frees again. written:
    operands that it changes. cost is None for a collective. bytes_read and bytes_written: what it
    moves.
    """

    target: str
    result: object
    new_bytes: tuple[int, ...]
    written: tuple[int, ...]
    cost: Cost | None
    collective: Collective | None
    collective_bytes: int = 0
    workspace_bytes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    key: str = ""
    is_unknown: bool = False


Workspace = Callable[[str, Sequence[Any], Mapping[str, Any], object], int]


class Forms:
    """Outcomes of operators, by target and the forms of their operands.

    schedule: whose operators they are. workspace: bytes that a kernel allocates beside its results,
    from the target, fake operands and result.
    """

    def __init__(self, schedule: Schedule, workspace: Workspace) -> None:
        self.schedule, self.workspace = schedule, workspace
        self.mode = FakeTensorMode()
        self.known: dict[object, Outcome] = {}

    def outcome(self, target: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Outcome:
        """Look up, or find out on fake tensors. args and kwargs hold `Held`s and constants.

        Raises GraphError for an operator that has no rule for fake tensors.
        """
        if target == _SLICE and len(args) > 3:
            args = _from_zero(args)
        key = (target, key_of(args), key_of(kwargs))
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self._find(target, args, kwargs)
        return found

    def _find(self, target: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Outcome:
        operands: list[Tensor] = []
        with self.mode, torch.no_grad():
            fake_args = self._fakes(args, operands)
            fake_kwargs = self._fakes(kwargs, operands)
            result = self._call(target, fake_args, fake_kwargs)
            scratch = self.workspace(target, fake_args, fake_kwargs, result)
        numbers: dict[int, int] = {}
        for i, x in enumerate(operands):
            numbers.setdefault(x.untyped_storage()._cdata, i)
        new: dict[int, int] = {}
        sizes: list[int] = []

        def describe(x: object) -> object:
            if isinstance(x, Tensor):
                address = x.untyped_storage()._cdata
                if waits(target):
                    return Made(form_of(x), 0, is_new=False)
                if address in numbers:
                    return Made(form_of(x), numbers[address], is_new=False)
                if address not in new:
                    new[address] = len(sizes)
                    sizes.append(x.untyped_storage().nbytes())
                return Made(form_of(x), new[address], is_new=True)
            if isinstance(x, list | tuple):
                return type(x)(describe(item) for item in x)
            return x

        described = describe(result)
        collective = collective_of(target)
        inputs = [form_of(x) for x in operands]
        outputs = [each.form for each in made_in(described)]
        moves = [] if _is_view(target) else inputs
        return Outcome(
            target=target,
            result=described,
            new_bytes=tuple(sizes),
            written=_written(target, fake_args, fake_kwargs, operands),
            cost=None
            if collective is not None
            else cost_of(target, fake_args, fake_kwargs, result),
            collective=collective,
            collective_bytes=0
            if collective is None
            else max(sum(f.num_bytes for f in each) for each in (inputs, outputs)),
            workspace_bytes=scratch,
            bytes_read=sum(form.num_bytes for form in moves),
            bytes_written=sum(form.num_bytes for form in outputs) if moves or not inputs else 0,
            key=signature(target, args, kwargs),
            is_unknown=target.startswith(OBJECT)
            or not (
                target.startswith(ISLAND)
                or target.partition(".")[0] in _KNOWN_NAMESPACES
                or has_formula(target)
            ),
        )

    def _call(self, target: str, args: Any, kwargs: Any) -> object:
        try:
            return self._callable(target)(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise GraphError(
                f"the size of what {target} yields depends on the data, so it has no price. Give "
                "it a bound: a mask or a padded form instead of a selection."
            ) from error
        except (UnsupportedOperatorException, NotImplementedError) as error:
            raise GraphError(
                f"{target} says nothing of the form of its result: it has no fake kernel. Give it "
                "one with torch.library.register_fake."
            ) from error

    def _callable(self, target: str) -> Callable[..., object]:
        if target.startswith(OBJECT):
            return self.schedule.objects[target.removeprefix(OBJECT)]
        if not target.startswith(ISLAND):
            return resolve(target)
        island = self.schedule.islands[target.removeprefix(ISLAND)]
        if island.mode:
            raise GraphError(
                "at level O2 a whole program is one kernel of TorchInductor's, and what is in it "
                "is not known before it is made. Price the step at level O1 instead."
            )
        return interpreted(island.program)

    def _fakes(self, x: Any, operands: list[Tensor]) -> Any:
        if isinstance(x, Held):
            form = x.form
            fake = torch.empty_strided(
                form.shape, form.stride, dtype=form.dtype, device=form.device
            )
            operands.append(fake)
            return fake
        if isinstance(x, list | tuple):
            return type(x)(self._fakes(item, operands) for item in x)
        if isinstance(x, Mapping):
            return {name: self._fakes(item, operands) for name, item in x.items()}
        return x


def form_of(x: Tensor | Value) -> Form:
    """The form of a tensor, or of a value at the edge of a schedule.

    Raises GraphError for a size that is known only when the program runs.
    """
    if isinstance(x, Value):
        if x.dtype is None:
            raise GraphError(
                f"{x.role.value} {x.name} is a size that is known only when the program runs. "
                "Capture with inputs of fixed sizes: the largest that occur."
            )
        return Form(x.shape, x.stride, x.dtype, x.device)
    return Form(tuple(x.shape), tuple(x.stride()), x.dtype, str(x.device))


def made_in(x: object) -> list[Made]:
    """All `Made`s in a described result."""
    if isinstance(x, Made):
        return [x]
    if isinstance(x, list | tuple):
        return [each for item in x for each in made_in(item)]
    return []


def held_in(x: object) -> list[Held]:
    """All tensors in an operand, in the order in which an `Outcome` numbers them."""
    if isinstance(x, Held):
        return [x]
    if isinstance(x, list | tuple):
        return [each for item in x for each in held_in(item)]
    if isinstance(x, Mapping):
        return [each for item in x.values() for each in held_in(item)]
    return []


def signature(target: str, args: Sequence[object], kwargs: Mapping[str, object]) -> str:
    """The operator and the forms and constants that it is given, as text: the key of a table."""
    given = [_text(x) for x in args]
    given += [f"{name}={_text(x)}" for name, x in kwargs.items()]
    return f"{target}({', '.join(given)})"


def _text(x: object) -> str:
    if isinstance(x, Held):
        x = x.form
    if isinstance(x, Form):
        dtype = str(x.dtype).removeprefix("torch.")
        dims = "x".join(map(str, x.shape))
        contiguous = x.stride == torch.empty(x.shape, device="meta").stride()
        return f"{dtype}[{dims}]" + ("" if contiguous else f"/{'x'.join(map(str, x.stride))}")
    if isinstance(x, list | tuple):
        return f"[{', '.join(map(_text, x))}]"
    return str(x)


def key_of(x: Any) -> object:
    """What two operands have in common that are treated alike: forms, and equal constants."""
    if isinstance(x, Held):
        return x.form
    if isinstance(x, list | tuple):
        return (type(x), *(key_of(item) for item in x))
    if isinstance(x, Mapping):
        return tuple((name, key_of(item)) for name, item in x.items())
    if isinstance(x, slice):
        return (x.start, x.stop, x.step)
    return (type(x), x)  # 1, 1.0 and True are equal, and make other dtypes


def _from_zero(args: Sequence[Any]) -> Sequence[Any]:
    """A slice of the same length from the start: gathered parameters are cut at many places."""
    x, dim, start, end, *step = args
    if not isinstance(x, Held) or not isinstance(dim, int):
        return args
    size = x.form.shape[dim]
    bounds = [0 if start is None else start, size if end is None else end]
    if not all(isinstance(each, int) for each in bounds):
        return args
    begin, stop = (min(max(each + size * (each < 0), 0), size) for each in bounds)
    return (x, dim, 0, max(stop - begin, 0), *step)


def _is_view(target: str) -> bool:
    return _is_named(target) and bool(getattr(resolve(target), "is_view", False))


def _is_named(target: str) -> bool:
    """Whether it is an operator of a library."""
    return not target.startswith((OBJECT, ISLAND))


def _written(target: str, args: Any, kwargs: Any, operands: Sequence[Tensor]) -> tuple[int, ...]:
    """Numbers of the operands that the operator's schema says it changes."""
    schema = getattr(resolve(target), "_schema", None) if _is_named(target) else None
    if schema is None or not schema.is_mutable:
        return ()
    numbers = {id(x): i for i, x in enumerate(operands)}
    found: list[int] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[i] if i < len(args) else kwargs.get(argument.name)
        given = given if isinstance(given, list | tuple) else [given]
        found += [numbers[id(x)] for x in given if isinstance(x, Tensor)]
    return tuple(found)
