"""What a captured program read besides its own state: globals, attributes of classes, defaults.

TorchDynamo's guards say what that was. Each read is kept with the schedule as a way to the value
(a module or an object of the walk, then step by step), beside what was found there. A stored
schedule is used only where the same is found, and only as long as it is found.
"""

# pyright: basic
# (It walks objects of any type, and TorchDynamo is not typed.)

import ast
import hashlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch._dynamo import source as sources

from plait.backend.fingerprint import PLAIN, TORCH_PLAIN, Fingerprint, Uncacheable, name_of, same

_STEPS: dict[str, Callable] = {
    "attribute": getattr,
    "item": lambda x, key: x[key],
    "key": lambda x, key: list(x)[key],
    "value": lambda x, key: list(x.values())[key],
    "default": lambda x, key: x.__defaults__[key],
    "keyword_default": lambda x, key: x.__kwdefaults__[key],
    "class": lambda x, key: type(x),
    "state": lambda x, key: x.__dict__,
}
_STATE = (
    sources.GlobalStateSource,
    sources.ShapeEnvSource,
    sources.TorchFunctionModeStackSource,
)  # modes: in the form of the call
_OF_TYPE = ("TYPE_MATCH", "DUPLICATE_INPUT")  # nothing about what is in it
_OF_DYNAMO = re.compile(r"__import_|_\d+_c\d+$")  # its own names of modules
_MAPPINGS = (dict, types.MappingProxyType)
_MODULE, _WALKED = "module", "walked"


@dataclass(frozen=True)
class Read:
    """A step of a way: from the value at index `base`, or, without base, from where `step` says.

    fact: what was found, None if only later steps matter. is_type: only of what type it is.
    """

    base: int | None
    step: str
    key: Any
    fact: str | None = None
    is_type: bool = False

    def to_json(self) -> list:
        """As plain data."""
        return [self.base, self.step, repr(self.key), self.fact, self.is_type]

    @staticmethod
    def from_json(data: list) -> "Read":
        """Read what `to_json` wrote."""
        base, step, key, fact, is_type = data
        if base is not None and step not in _STEPS:
            raise ValueError(f"there is no step {step}")
        return Read(base, step, ast.literal_eval(key), fact, is_type)


class Comparison:
    """Reads to be compared with what is there now, cheaply, as often as wanted."""

    def __init__(self, reads: list[Read], found: Fingerprint) -> None:
        self._reads, self._found = reads, found
        roots = [_root(x, found) if x.base is None else None for x in reads]
        self._steps: list[tuple[int | None, Any, object]] = [
            (x.base, root if x.base is None else _STEPS[x.step], x.key)
            for x, root in zip(reads, roots, strict=True)
        ]
        self._then: list[tuple] = [(_NOTHING if x.fact else _ANYTHING, None, []) for x in reads]

    def holds(self) -> bool:
        """Whether every read finds now what it found when the program was captured."""
        values: list = []
        try:
            for (base, step, key), (then, parts, held) in zip(self._steps, self._then, strict=True):
                value = step if base is None else step(values[base], key)
                values.append(value)
                if then is _ANYTHING:
                    continue
                if value is not then or (parts is not None and not same(parts(value), held)):
                    self._look_again(len(values) - 1, value)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, _Differs):
            return False  # something on the way is another, or gone
        return True

    def _look_again(self, i: int, value: object) -> None:
        """Accept another object of which the same is to be said."""
        read = self._reads[i]
        if _fact(value, read.is_type, self._found) != read.fact:
            raise _Differs
        parts = None if read.is_type else _parts_of(value)
        self._then[i] = (value, parts, parts(value) if parts else [])


class _Differs(Exception):
    """A read finds something else."""


_NOTHING, _ANYTHING = object(), object()


def compare(reads: list[Read], found: Fingerprint) -> Comparison | None:
    """A comparison that holds now; None if something else is found."""
    try:
        comparison = Comparison(reads, found)
    except (KeyError, IndexError):
        return None  # a module that is not imported here
    return comparison if comparison.holds() else None


def reads_of(guards: Iterable, scope: Mapping[str, dict], found: Fingerprint) -> list[Read]:
    """The reads behind a frame's guards. scope: its globals as G, its locals as L.

    What the walk compares is left out. Raises Uncacheable if there is no way to something that was
    read which another process could go too.
    """
    ways = _Ways(scope, found)
    for guard in guards:
        ways.add(guard)
    return ways.reads


class _Ways:
    def __init__(self, scope: Mapping[str, dict], found: Fingerprint) -> None:
        self.scope, self.found = scope, found
        self.reads: list[Read] = []
        self.values: list[object] = []
        self.known: dict = {}

    def add(self, guard) -> None:
        source = guard.originating_source
        if isinstance(source, _STATE):
            return
        try:
            i, value = self.visit(source)
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise Uncacheable(f"the program reads {guard.name}, which is not there") from error
        if i is None or isinstance(value, Tensor):
            return
        is_type = guard.create_fn_name() in _OF_TYPE
        old = self.reads[i]
        if old.fact is None or old.is_type > is_type:
            fact = _fact(value, is_type, self.found)
            self.reads[i] = Read(old.base, old.step, old.key, fact, is_type)

    def visit(self, source) -> tuple[int | None, object]:
        """Index of the read, None where the walk or the form of the call knows it; and value."""
        if source not in self.known:
            self.known[source] = self.find(source)
        return self.known[source]

    def find(self, source) -> tuple[int | None, object]:
        if isinstance(source, sources.LocalSource):
            return None, self.scope["L"][source.local_name]
        if isinstance(source, sources.GlobalSource):
            return self.find_global(source.global_name)
        if isinstance(source, sources.ImportSource):
            return self.root(_MODULE, source.module_name)
        if not hasattr(source, "base"):
            raise Uncacheable(f"the program reads {source.name}, which has no name elsewhere")
        base, holder = self.visit(source.base)
        if base is None and isinstance(source, sources.TypeSource):
            return self.class_of(holder)
        if isinstance(source, sources.NNModuleSource | sources.SkipGuardSource):
            return base, holder
        if isinstance(source, sources.TensorPropertySource):
            return base, None
        step, key = _step_of(source)
        value = _STEPS[step](holder, key)
        if base is None:
            number = self.found.numbers.get(id(holder))
            if number is None or self.is_walked(holder, step, key, value):
                return None, value
            base, _ = self.root(_WALKED, number)
        elif id(holder) in self.found.numbers and self.is_walked(holder, step, key, value):
            self.state(base, holder)
            return None, value
        return self.put(base, step, key, value)

    def find_global(self, name: str) -> tuple[int | None, object]:
        names = self.scope["G"]
        value = names[name]
        if isinstance(value, types.ModuleType) and _OF_DYNAMO.match(name):
            return self.root(_MODULE, value.__name__)
        if name.startswith("__builtins_dict__"):
            base, builtins = self.root(_MODULE, "builtins")
            return self.put(base, "state", None, vars(builtins))
        module = sys.modules.get(str(names.get("__name__")))
        if module is None or vars(module) is not names:
            raise Uncacheable(f"the program reads the global {name} of what is no module")
        base, _ = self.root(_MODULE, module.__name__)
        return self.put(base, "attribute", name, value)

    def class_of(self, holder: object) -> tuple[int | None, object]:
        """The class, once for all objects of it: the walk compares of which class each is."""
        kind = type(holder)
        number = self.found.numbers.get(id(holder))
        if number is None:
            return None, kind
        if kind not in self.known:
            base, _ = self.root(_WALKED, number)
            self.known[kind] = self.put(base, "class", None, kind)
        return self.known[kind]

    def root(self, step: str, key: object) -> tuple[int | None, object]:
        read = Read(None, step, key)
        if read not in self.known:
            self.reads.append(read)
            self.known[read] = len(self.reads) - 1, _root(read, self.found)
        return self.known[read]

    def put(self, base: int | None, step: str, key: object, value: object) -> tuple:
        place = (base, step, repr(key))
        if place not in self.known:
            self.reads.append(Read(base, step, key))
            self.known[place] = len(self.reads) - 1, value
        return self.known[place]

    def state(self, i: int, value: object) -> None:
        """Note that this object of the walk is found there: what it holds, the walk compares."""
        old = self.reads[i]
        if old.fact is None and old.base is not None:
            fact = _fact(value, False, self.found)
            self.reads[i] = Read(old.base, old.step, old.key, fact)

    def is_walked(self, holder: object, step: str, key: object, value: object) -> bool:
        """Whether the walk compares this part of what it has walked."""
        if isinstance(holder, type | types.FunctionType | types.MethodType | types.ModuleType):
            return False
        if step == "item":
            return isinstance(holder, list | tuple | dict)
        if step in ("key", "value"):
            return isinstance(holder, dict)
        if step == "state":
            return True
        return step == "attribute" and isinstance(key, str) and _own(holder, key, value)


def _own(holder: object, name: str, value: object) -> bool:
    state = getattr(holder, "__dict__", {})
    if name == "__dict__" or name in state:
        return True
    if isinstance(holder, nn.Module):
        return any(name in state[each] for each in ("_parameters", "_buffers", "_modules"))
    return False


def _step_of(source) -> tuple[str, object]:
    kind = type(source)
    if isinstance(source, sources.AttrSource | sources.GenericAttrSource | sources.GradSource):
        return "attribute", source.member
    if kind is sources.CodeSource:
        return "attribute", "__code__"
    if kind is sources.ClosureSource:
        return "attribute", "__closure__"
    if kind is sources.TypeMROSource:
        return "attribute", "__mro__"
    if kind is sources.TypeSource:
        return "class", None
    if kind is sources.TypeDictSource:
        return "state", None
    if kind is sources.DefaultsSource:
        return ("keyword_default" if source.is_kw else "default"), source.idx_key
    if kind is sources.ConstDictKeySource and isinstance(source.index, int):
        return "key", source.index
    if kind in (
        sources.GetItemSource,
        sources.ListGetItemSource,
        sources.DictGetItemSource,
        sources.DictSubclassGetItemSource,
    ):
        if isinstance(source.index, sources.ConstDictKeySource):
            return "value", source.index.index
        if not getattr(source, "index_is_slice", False) and isinstance(
            source.index, str | int | bytes | float | bool | None
        ):
            return "item", source.index
    raise Uncacheable(f"the program reads {source.name}, to which there is no plain way")


def _root(read: Read, found: Fingerprint) -> object:
    if read.step == _WALKED:
        return found.objects[read.key]
    return sys.modules[read.key]


def _parts_of(x: object) -> Callable[..., list] | None:
    """What in an object has to stay the same; None where the object itself says all.

    Attributes and items that were read have reads of their own.
    """
    if isinstance(x, (PLAIN, TORCH_PLAIN, type, types.ModuleType)):
        return None
    if isinstance(x, types.FunctionType):
        return _code_of
    if isinstance(x, (*_MAPPINGS, list, tuple, set, frozenset)):
        return list
    return _names_in if hasattr(x, "__dict__") else None


def _code_of(x: types.FunctionType) -> list:
    return [x.__code__]


def _names_in(x: object) -> list:
    return list(x.__dict__)


def _fact(x: object, is_type: bool, found: Fingerprint) -> str:
    """What two processes say alike of a value."""
    if isinstance(x, (PLAIN, TORCH_PLAIN)):
        return f"{type(x).__name__} {x!r}"
    number = found.numbers.get(id(x))
    if number is not None:
        return f"walked {number}"
    if isinstance(x, types.FunctionType):
        return f"function {name_of(x)} {_code(x.__code__)}"
    if isinstance(x, types.CodeType):
        return f"code {_code(x)}"
    if isinstance(x, types.MethodType):
        return f"method {name_of(x.__func__)} {_fact(x.__self__, True, found)}"
    if isinstance(x, type | types.ModuleType | types.BuiltinFunctionType):
        return f"named {name_of(x)}"
    kind = name_of(type(x))
    if is_type:
        return kind
    if isinstance(x, _MAPPINGS):
        names = [key for key in x if not (isinstance(key, str) and key.startswith("__"))]
        return f"{kind} {[_brief(key) for key in names]}"
    if isinstance(x, list | tuple):
        return f"{kind} {[_brief(item) for item in x]}"
    if isinstance(x, set | frozenset):
        return f"{kind} {sorted(_brief(item) for item in x)}"
    return f"{kind} {list(getattr(x, '__dict__', ()))}"


def _brief(x: object) -> str:
    return repr(x) if isinstance(x, (PLAIN, TORCH_PLAIN)) else name_of(type(x))


def _code(code: types.CodeType) -> str:
    constants = [c for c in code.co_consts if isinstance(c, PLAIN)]
    return hashlib.sha256(code.co_code + repr((code.co_names, constants)).encode()).hexdigest()
