"""What a program's graph depends on: found by walking the function, its modules and its inputs.

Two processes whose programs have equal fingerprints capture the same graph, so a stored schedule
can be used before anything is captured. What the walk does not understand makes the program
uncacheable; it is never skipped.
"""

# pyright: basic
# (It walks objects of any type.)

import enum
import hashlib
import inspect
import logging
import operator
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum)
TORCH_PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_NOT_IN_FORWARD = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
    "_non_persistent_buffers_set",
)
_OWN_HASH = "_original_object_hash"  # of transformers' configs: another one in each process
_MAX_OBJECTS = 200_000
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the class was made by a class statement


_ON_ALL_MODULES = (
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
)


class Uncacheable(Exception):
    """The program depends on something that has no fingerprint; the message says on what."""


@dataclass
class Fingerprint:
    """words: the text that two equal programs share. files: sources that the words do not hold.

    places: the number of each tensor, by id; tensors: where it is found. numbers and objects: what
    was walked, by id and in order. watched, globals and hooks: what was walked, with what it held,
    to notice a change; of hooks there are none.
    """

    words: list[str] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    places: dict[int, int] = field(default_factory=dict)
    tensors: list[tuple[Mapping | list, object]] = field(default_factory=list)
    forms: list[tuple] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    objects: list[object] = field(default_factory=list)  # kept, so that no id is used twice
    watched: list[tuple[Callable[..., list], object, list]] = field(default_factory=list)
    hooks: list[Mapping] = field(default_factory=list)
    globals: list[tuple[dict, str, object]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """SHA-256 of the words."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def is_current(self) -> bool:
        """Whether nothing that was walked has been replaced since."""
        return (
            all(same(parts(held), then) for parts, held, then in self.watched)
            and not any(self.hooks)
            and all(names.get(name, self) is then for names, name, then in self.globals)
            and [_form(x) for x in self.values()] == self.forms
        )

    def values(self) -> list[Tensor]:
        """The tensors, as they are now."""
        return [held[key] for held, key in self.tensors]  # type: ignore[index]


def same(now: list, then: list) -> bool:
    """Whether two lists hold the same objects."""
    return len(now) == len(then) and all(map(operator.is_, now, then))


def _of_object(held: Any) -> list:
    state = held.__dict__
    return [type(held), *state, *state.values()]


def _of_mapping(held: Mapping) -> list:
    return [*held, *held.values()]


def _of_cell(held: types.CellType) -> list:
    return [held.cell_contents]


def _of_function(held: types.FunctionType) -> list:
    return [held.__code__, held.__defaults__, held.__kwdefaults__]


def fingerprint(function: Callable) -> Fingerprint:
    """Walk a function or module. Raises Uncacheable."""
    walk = _Walk()
    for name in _ON_ALL_MODULES:
        walk.no_hooks(getattr(torch.nn.modules.module, name), "every module")
    walk.visit(function, "the program")
    return walk.found


class _Walk:
    def __init__(self) -> None:
        self.found = Fingerprint()
        self.classes: set[type] = set()

    def say(self, *words: object) -> None:
        self.found.words.append(" ".join(str(word) for word in words))

    def visit(self, x: object, path: str, place: tuple | None = None) -> None:
        if isinstance(x, (PLAIN, TORCH_PLAIN)):
            self.say(path, type(x).__name__, repr(x))
            return
        if id(x) in self.found.numbers:
            self.say(path, "is", self.found.numbers[id(x)])
            return
        self.found.numbers[id(x)] = len(self.found.numbers)
        self.found.objects.append(x)
        if len(self.found.numbers) > _MAX_OBJECTS:
            raise Uncacheable(f"more than {_MAX_OBJECTS} objects")
        if isinstance(x, Tensor):
            self.tensor(x, path, place)
        elif isinstance(x, nn.Module):
            self.module(x, path)
        elif isinstance(x, types.FunctionType):
            self.function(x, path)
        elif isinstance(x, types.MethodType):
            self.visit(x.__func__, f"{path}.function")
            self.visit(x.__self__, f"{path}.self")
        elif isinstance(x, type | types.BuiltinFunctionType | types.ModuleType):
            self.named(x, path)
        elif isinstance(x, list | tuple | dict | set | frozenset):
            self.container(x, path)
        elif isinstance(x, logging.Logger):
            self.say(path, "logger", x.name)
        else:
            self.instance(x, path)

    def instance(self, x: object, path: str) -> None:
        """An instance of a class written in Python, all of whose state is in its __dict__."""
        written = all(cls.__flags__ & _HEAP_TYPE for cls in type(x).__mro__[:-1])
        if not written or not hasattr(x, "__dict__") or type(x).__module__.startswith("torch"):
            raise Uncacheable(f"{path} is a {name_of(type(x))}")
        self.source(type(x))
        self.say(path, "object", name_of(type(x)))
        self.watch(_of_object, x)
        self.mapping(vars(x), path)

    def tensor(self, x: Tensor, path: str, place: tuple | None) -> None:
        if type(x) not in (Tensor, nn.Parameter) or place is None:
            raise Uncacheable(f"{path} is a {type(x).__name__} out of reach")
        if x._backward_hooks or not x.is_leaf:
            raise Uncacheable(f"{path} has hooks or a history")
        self.say(path, "tensor", type(x).__name__, _form(x), x.stride())
        self.found.forms.append(_form(x))
        self.found.places[id(x)] = len(self.found.tensors)
        self.found.tensors.append(place)  # type: ignore[arg-type]

    def no_hooks(self, hooks: Mapping | None, path: str) -> None:
        if hooks:
            raise Uncacheable(f"{path} has hooks")
        if hooks is not None:
            self.found.hooks.append(hooks)

    def module(self, x: nn.Module, path: str) -> None:
        for name in _HOOKS:
            self.no_hooks(getattr(x, name, None), path)
        self.source(type(x))
        self.say(path, "module", name_of(type(x)))
        self.class_globals(type(x), path)
        self.watch(_of_object, x)
        for name, value in vars(x).items():
            if name in _HOOKS or name in _NOT_IN_FORWARD:
                continue
            if name in ("_parameters", "_buffers", "_modules"):
                self.mapping(value, f"{path}.{name}")
            else:
                self.visit(value, f"{path}.{name}")

    def function(self, x: types.FunctionType, path: str) -> None:
        self.source(x)
        self.say(path, "function", name_of(x), hashlib.sha256(x.__code__.co_code).hexdigest())
        self.say(path, "constants", [c for c in x.__code__.co_consts if isinstance(c, PLAIN)])
        self.watch(_of_function, x)
        for i, cell in enumerate(x.__closure__ or ()):
            self.watch(_of_cell, cell)
            self.visit(cell.cell_contents, f"{path}.closure[{i}]")
        self.visit(x.__defaults__ or (), f"{path}.defaults")
        self.visit(x.__kwdefaults__ or {}, f"{path}.keyword_defaults")
        for name in x.__code__.co_names:
            if name in x.__globals__:
                value = x.__globals__[name]
                self.found.globals.append((x.__globals__, name, value))
                self.visit(value, f"{path}.global {name}")

    def class_globals(self, x: type, path: str) -> None:
        """Plain globals that methods of a module's class read."""
        for cls in x.__mro__:
            if cls is nn.Module or cls in self.classes:
                continue
            self.classes.add(cls)
            for method in vars(cls).values():
                if not isinstance(method, types.FunctionType):
                    continue
                for name in method.__code__.co_names:
                    value = method.__globals__.get(name, self)
                    if isinstance(value, PLAIN):
                        self.found.globals.append((method.__globals__, name, value))
                        self.say(path, "global", name, repr(value))

    def named(self, x: object, path: str) -> None:
        """A class, built-in function or imported module: known by its name and source file."""
        self.say(path, "named", name_of(x))
        self.source(x)

    def container(self, x: list | tuple | dict | set | frozenset, path: str) -> None:
        self.say(path, name_of(type(x)), len(x))
        if hasattr(x, "__dict__"):
            self.mapping(vars(x), f"{path}.__dict__")
        if isinstance(x, dict):
            self.mapping(x, path)
            return
        if not isinstance(x, tuple):
            self.watch(list, x)
        if isinstance(x, set | frozenset):
            x = sorted(x, key=repr)
        for i, item in enumerate(x):
            self.visit(item, f"{path}[{i}]", (x, i))

    def mapping(self, x: Mapping, path: str) -> None:
        self.watch(_of_mapping, x)
        for key, value in x.items():
            if key == _OWN_HASH:
                continue
            if not isinstance(key, PLAIN):
                raise Uncacheable(f"{path} has a key of type {type(key).__name__}")
            self.visit(value, f"{path}.{key}", (x, key))

    def watch(self, parts: Callable[..., list], x: object) -> None:
        self.found.watched.append((parts, x, parts(x)))

    def source(self, x: object) -> None:
        try:
            file = inspect.getsourcefile(x)  # type: ignore[arg-type]
        except TypeError:
            return  # built in: the version of Python or torch says which it is
        if file is not None and Path(file).exists():
            self.found.files.add(file)


def _form(x: Tensor) -> tuple:
    return (x.dtype, x.shape, x.requires_grad, x.device)


def name_of(x: object) -> str:
    """Name of a class, function or module, with that of its module."""
    return f"{getattr(x, '__module__', '')}.{getattr(x, '__qualname__', getattr(x, '__name__', x))}"
