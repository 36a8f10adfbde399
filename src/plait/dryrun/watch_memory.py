"""Eager PyTorch on fake tensors: what its memory does, without the memory.

A step that is not compiled has no schedule that says when a tensor dies: Python's references,
autograd's saved tensors and the hooks of FSDP2 decide. So the program itself runs, with all of
these, on tensors that have no data; each operator is noted as it is dispatched, and each memory is
noted as free when its last reference is gone [as `torch.distributed._tools.mem_tracker` does].
"""

# pyright: basic
# (Dispatch modes, fake tensors and optimizers' states are not typed.)

import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PythonCallbackWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from plait.cost.collectives import collective_of
from plait.dryrun.memory_trace import Kind, MemoryTrace, Storage

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_KNOWN = "plait_known_values"  # an attribute of fake tensors
_MOST_FOLLOWED = 2**16
_COMMUNICATION = ("c10d.", "_c10d_functional.", "fsdp.")


class EagerMemory(TorchDispatchMode):
    """Notes the memory of what runs inside, on fake tensors. `trace` holds what was seen.

    workspace: bytes that a kernel allocates beside its results. A program may look at values that
    no data decide (positions, step counts): small ones are computed beside the fake tensors. Where
    it looks at another, it sees 1.0, or False where that is no float.
    """

    def __init__(self, workspace: Callable[..., int], *, with_sources: bool = False) -> None:
        super().__init__()
        self.trace = MemoryTrace()
        self.moment = -1
        self.workspace, self.with_sources = workspace, with_sources
        self.number_of: dict[int, int] = {}  # by address of the storage
        self.watched: dict[int, Any] = {}
        self.was_backward = False
        self.depth = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(hasattr(each, "__tensor_flatten__") for each in types):
            return NotImplemented  # a DTensor: what it does on its own part comes next
        if func.namespace == "prim":  # questions about a tensor
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            value = _value(args[0])
            if value is not None:
                with _disable_current_modes():
                    return value.item()
            return args[0].dtype.is_floating_point and 1.0  # a step count, or False
        if _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        self._enter_backward()
        self.moment += 1
        result = func(*args, **kwargs)
        operator = str(func)
        if operator == "c10d.send.default":
            return _sending(args[0])
        for x in _tensors(result):
            self._note(x, operator)
        _follow_values(func, args, kwargs, result)
        scratch = self.workspace(operator, args, kwargs, result)
        if scratch:
            storage = Storage(scratch, Kind.WORKSPACE, self.moment, "", operator, self._source())
            self.trace.free(self.trace.allocate(storage), self.moment)
        return result

    def adopt(self, value: Any, kind: Kind) -> None:
        """Take in tensors that were there before."""
        for x in _tensors(value):
            address = x.untyped_storage()._cdata
            if address not in self.number_of:
                storage = Storage(x.untyped_storage().nbytes(), kind, -1)
                self.number_of[address] = self.trace.allocate(storage)

    def num_bytes(self, value: Any) -> int:
        """Size of the memory in which tensors lie, each once."""
        addresses = {x.untyped_storage()._cdata for x in _tensors(value)}
        found = {self.number_of[each] for each in addresses if each in self.number_of}
        return sum(self.trace.storages[each].num_bytes for each in found)

    def __enter__(self):
        # A composite operator enters the mode once more.
        if not self.depth:
            self.resize = resize = torch.UntypedStorage.resize_

            def resize_(storage: torch.UntypedStorage, size: int) -> None:
                resize(storage, size)
                self._resized(storage)

            torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        self.depth += 1
        return super().__enter__()

    def __exit__(self, *error):
        self.depth -= 1
        if not self.depth:
            torch.UntypedStorage.resize_ = self.resize  # type: ignore[method-assign]
        return super().__exit__(*error)

    def mark(self, tensors: Iterable[Tensor | None], kind: Kind, names: Sequence[str] = ()) -> None:
        """Say what the memory of tensors is for, and whose it is."""
        for i, x in enumerate(tensors):
            for part in _tensors(_local(x)):
                number = self.number_of.get(part.untyped_storage()._cdata)
                if number is not None:
                    self.trace.storages[number].kind = kind
                    self.trace.storages[number].name = names[i] if names else ""

    def _enter_backward(self) -> None:
        """What lives when the backward begins, and was made for nothing else, is saved for it."""
        is_backward = torch._C._current_autograd_node() is not None
        if is_backward and not self.was_backward:
            for number in self.number_of.values():
                storage = self.trace.storages[number]
                if storage.kind is Kind.TEMPORARIES:
                    storage.kind = Kind.ACTIVATIONS
        self.was_backward = is_backward

    def _note(self, x: Tensor, operator: str) -> None:
        if x.layout is not torch.strided:
            return
        storage = x.untyped_storage()
        if not storage.nbytes():
            return
        known = self.number_of.get(storage._cdata)
        if known is not None:
            if self.trace.storages[known].num_bytes == storage.nbytes():
                return
            self._freed(storage._cdata)  # resized in place
        is_message = operator.startswith(_COMMUNICATION) or collective_of(operator) is not None
        kind = Kind.COMMUNICATION if is_message else Kind.TEMPORARIES
        self._watch(storage, kind, operator)

    def _watch(self, storage: torch.UntypedStorage, kind: Kind, operator: str) -> None:
        """Note an allocation, and be told when its last reference is gone."""
        address = storage._cdata
        made = Storage(storage.nbytes(), kind, self.moment, "", operator, self._source())
        self.number_of[address] = self.trace.allocate(made)
        self.watched[address] = weakref.finalize(storage, self._freed, address)
        self.watched[address].atexit = False

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """Note the new size of a memory: FSDP2 frees and allocates what it gathers into so."""
        known = self.number_of.get(storage._cdata)
        kind = Kind.COMMUNICATION if known is None else self.trace.storages[known].kind
        self._freed(storage._cdata)
        if storage.nbytes():
            self._watch(storage, kind, "storage.resize_")

    def _freed(self, address: int) -> None:
        number = self.number_of.pop(address, None)
        watch = self.watched.pop(address, None)
        if watch is not None:
            watch.detach()
        if number is not None:
            self.trace.free(number, self.moment)

    def _source(self) -> str:
        if not self.with_sources:
            return ""
        frame = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_filename
            if not name.startswith((*_LIBRARIES, "<")):
                return f"{name}:{frame.f_lineno}, in {frame.f_code.co_name}"
            frame = frame.f_back
        return ""


def _sending(message: list[Tensor]) -> Any:
    """What a send returns: it keeps the message until it is itself dropped.

    So does gloo's [torch/csrc/distributed/c10d/ProcessGroupGloo.hpp, SendWork]; a fake group's
    keeps nothing.
    """
    return PythonCallbackWork(lambda timeout: bool(message)).boxed()


def _value(x: Tensor) -> Tensor | None:
    """The values of a tensor, where they are known."""
    return getattr(x, _KNOWN, None) if isinstance(x, FakeTensor) else x


def _follow_values(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Compute what an operator makes of known values, where it is small and no random draw."""
    made = _tensors(result)
    if not made or not all(map(_is_followed, made)):
        return
    if torch.Tag.nondeterministic_seeded in func.tags:
        return
    if any(_value(x) is None for x in _tensors((args, kwargs))):
        return
    with _disable_current_modes(), torch.no_grad():
        values = func(*_with_values(args), **_with_values(kwargs))
    for x, value in zip(made, _tensors(values), strict=True):
        if isinstance(x, FakeTensor):
            setattr(x, _KNOWN, value)


def _is_followed(x: Tensor) -> bool:
    is_number = x.dtype.is_floating_point or x.dtype.is_complex
    return x.device.type == "cpu" and x.numel() <= (1 if is_number else _MOST_FOLLOWED)


def _with_values(x: Any) -> Any:
    if isinstance(x, Tensor):
        return _value(x)
    if isinstance(x, list | tuple):
        return type(x)(_with_values(item) for item in x)
    if isinstance(x, dict):
        return {name: _with_values(item) for name, item in x.items()}
    return x


def _is_composite(func: Any) -> bool:
    """Whether it is made of other operators, and has no kernel (as silu_backward has)."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    is_composite = has_kernel(func.name(), "CompositeImplicitAutograd")
    return is_composite and not has_kernel(func.name(), "CPU")


def _local(x: Any) -> Any:
    return x._local_tensor if hasattr(x, "_local_tensor") else x


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, list | tuple):
        return [each for item in x for each in _tensors(item)]
    if isinstance(x, dict):
        return _tensors(list(x.values()))
    return []
