"""A program that a user might compile, and what can be seen of one run of it.

A program is a function that builds a `Case`: the thing to compile and a script that uses it. It is
built anew for every run, under a fixed seed, so that the eager and the compiled run begin equal.
"""

import dataclasses
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Target = Callable[..., Any]
SEED = 1234


@dataclass(frozen=True)
class Case:
    """What is compiled, and what is done with it; the script returns all that is compared."""

    target: Target
    script: Callable[[Target], object]


@dataclass(frozen=True)
class Program:
    """A case under its name.

    num_graphs: graphs that Dynamo hands over in the whole script, recompilations included;
        None where a compiler may choose.
    breaks: texts of the lines at which the report must see a break; None where any will do.
    """

    name: str
    num_graphs: int | None
    build: Callable[[], Case]
    breaks: tuple[str, ...] | None = None


class Call:
    """Arguments of one call, and what is done before it."""

    def __init__(self, *args: Any, before: Callable[[], object] | None = None, **kwargs: Any):
        self.args, self.kwargs, self.before = args, kwargs, before


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as it was; equal if every bit and every property is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    data: bytes = field(repr=False)
    values: Tensor = field(compare=False, repr=False)

    def largest_difference_from(self, other: "TensorRecord") -> float:
        """Return the largest absolute difference of two elements; NaN if one of them is."""
        if self.shape != other.shape or not self.values.numel():
            return float("nan")
        kind = torch.complex128 if self.dtype.is_complex else torch.float64
        return (self.values.to(kind) - other.values.to(kind)).abs().max().item()


@dataclass(frozen=True)
class Raised:
    """An exception: its type, the user's line in its traceback, and all that is printed of it."""

    kind: type[Exception]
    line: str
    text: str

    def is_told_by(self, other: object) -> bool:
        """Say whether another run raised the same type and names the same line."""
        return isinstance(other, Raised) and other.kind is self.kind and self.line in other.text


def program(*, graphs: int | None, breaks: tuple[str, ...] | None = None):
    """Turn a function that builds a case into a `Program`."""

    def decorate(build: Callable[[], Case]) -> Program:
        return Program(build.__name__, graphs, build, breaks)

    return decorate


def collect(module: Mapping[str, Any]) -> list[Program]:
    """List the programs among the variables of a module."""
    return [value for value in module.values() if isinstance(value, Program)]


def calls(target: Target, *given: Call, watch: Iterable[Any] = (), backward: bool = True) -> Case:
    """Call once for each of `given`; record outputs, gradients, state and printed text.

    watch: further tensors, modules and mutable containers that are looked at after each call.
    """
    seen = [*watch, *([target] if isinstance(target, nn.Module) else [])]

    def script(run: Target) -> object:
        return [one_call(run, call, seen, backward=backward) for call in given]

    return Case(target, script)


def one_call(run: Target, call: Call, watch: Iterable[Any] = (), *, backward: bool = True) -> Any:
    """Call, go backward, and record everything that can be seen afterwards."""
    if call.before is not None:
        call.before()
    torch.manual_seed(SEED)
    printed = StringIO()
    with redirect_stdout(printed):
        try:
            output = run(*call.args, **call.kwargs)
        except Exception as error:
            return Raised(type(error), user_line(error), exception_text(error))
        record = {"output": snapshot(output), "aliases": aliases(output, call)}
        if backward:
            go_backward(output)
    leaves = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    return record | {
        "printed": printed.getvalue(),
        "arguments": snapshot(leaves),
        "argument gradients": [snapshot(leaf.grad) for leaf in leaves if leaf.is_leaf],
        "watched": [snapshot_state(thing) for thing in watch],
        "next draw": torch.rand(()).item(),
    }


def go_backward(output: object, **options: Any) -> None:
    """Go backward from every output, with the same weights in every run."""
    leaves = [leaf for leaf in unpack(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    generator = torch.Generator().manual_seed(SEED)
    weights = [torch.randn(leaf.shape, generator=generator).to(leaf.dtype) for leaf in leaves]
    if leaves:
        torch.autograd.backward(leaves, weights, **options)


def user_line(error: Exception) -> str:
    """Return the innermost line of a program that the traceback goes through."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.line or "" for frame in frames if "programs_" in frame.filename]
    return lines[-1] if lines else ""


def exception_text(error: Exception) -> str:
    """Return what Python prints of an exception: message, notes, causes and traceback."""
    return "".join(traceback.format_exception(error))


def aliases(output: object, call: Call) -> list[tuple[int, int]]:
    """Pairs (i, j) of output i and argument j that are one memory."""
    outputs = [leaf for leaf in unpack(output) if isinstance(leaf, Tensor)]
    arguments = [leaf for leaf in tree_leaves((call.args, call.kwargs)) if isinstance(leaf, Tensor)]
    return [
        (i, j)
        for i, out in enumerate(outputs)
        for j, argument in enumerate(arguments)
        if out.numel() and out.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr()
    ]


def unpack(value: object) -> list[Any]:
    """List the leaves of nested containers, dataclasses included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, (dict, type)):
        value = vars(value)
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in unpack(item)]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [leaf for item in value for leaf in unpack(item)]
    return [value]


def snapshot(value: Any) -> Any:
    """Copy a nested value, its tensors turned into records."""
    if isinstance(value, Tensor):
        values = value.detach().clone().resolve_conj().resolve_neg().contiguous()
        data = values.reshape(-1).view(torch.uint8).numpy().tobytes()
        stride = tuple(value.stride()) if value.numel() else ()
        return TensorRecord(
            value.dtype, tuple(value.shape), stride, value.requires_grad, data, values
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, (dict, type)):
        return (type(value).__name__, snapshot(vars(value)))
    if isinstance(value, Mapping):
        return (type(value).__name__, {key: snapshot(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, [snapshot(item) for item in value])
    return value


def snapshot_state(thing: Any) -> Any:
    """Snapshot a tensor with its gradient, a module with everything it holds, or a container.

    A parameter that the loss does not reach may have a zero gradient where eager has none.
    """
    if isinstance(thing, Tensor):
        return snapshot([thing, thing.grad])
    if isinstance(thing, nn.Module):
        gradients = {
            name: snapshot(torch.zeros_like(p) if p.grad is None else p.grad)
            for name, p in thing.named_parameters()
        }
        plain = {
            f"{name}.{key}": value
            for name, module in thing.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, (int, float, str, bool)) and not key.startswith("_")
        }
        return [snapshot(dict(thing.state_dict())), gradients, plain]
    return snapshot(thing)


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    """Describe each place at which two snapshots differ."""
    if isinstance(expected, (dict, list, tuple)) and type(expected) is type(found):
        is_mapping = isinstance(expected, dict)
        if (expected.keys() != found.keys()) if is_mapping else (len(expected) != len(found)):
            return [f"{where}: {expected} became {found}"]
        keys = expected.keys() if is_mapping else range(len(expected))
        return [
            line
            for key in keys
            for line in differences(expected[key], found[key], f"{where}.{key}")
        ]
    if isinstance(expected, Raised):
        is_same = expected.is_told_by(found)
    else:
        is_same = type(expected) is type(found) and expected == found
    if is_same:
        return []
    line = f"{where}: {expected} became {found}"
    if isinstance(expected, TensorRecord) and isinstance(found, TensorRecord):
        line += f", up to {expected.largest_difference_from(found):.2g} away"
    return [line]
