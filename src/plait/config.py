"""Settings: frozen dataclasses, their one override (`--set path=value`), and their JSON form.

A recipe makes a dataclass with everything in it, `override` changes single fields of it, `to_json`
and `from_json` carry it to `resolved.json` and back without loss.
"""

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeVar

from plait.errors import ConfigError, nearest_name

T = TypeVar("T")
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def override(settings: T, assignments: Sequence[str]) -> T:
    """Return a copy of a dataclass with each "path.to.field=value" applied, typed and checked.

    The result is checked once, when all are applied. Raises ConfigError for a malformed assignment,
    an unknown field (the nearest name is offered), a value of the wrong type, or values that the
    dataclass itself refuses.
    """
    data = to_json(settings)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        path = path.strip()
        if not equals or not path:
            raise ConfigError(f"--set {assignment!r} is not of the form path.to.field=value.")
        _assign(type(settings), data, path.split("."), text, path=path)
    return from_json(type(settings), data)


def to_json(value: Any) -> Json:
    """Turn a settings dataclass into what `json.dump` takes; tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        items = typing.cast("Sequence[Any]", value)
        return [to_json(item) for item in items]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a setting of type {type(value).__name__} has no JSON form: {value!r}")


def from_json(kind: type[T], data: Json, *, path: str = "") -> T:
    """Rebuild a settings dataclass from its JSON form; raises ConfigError naming a wrong field."""
    return typing.cast("T", _parse(kind, data, path=path, from_text=False))


def _assign(kind: Any, data: Json, names: list[str], text: str, *, path: str) -> None:
    """Put one value into the JSON form of a dataclass of type `kind`."""
    for depth, name in enumerate(names):
        kind = _without_none(kind)
        if not dataclasses.is_dataclass(kind) or not isinstance(data, dict):
            raise ConfigError(f"--set {path}: {'.'.join(names[:depth])} is a single value.")
        hints = _field_types(typing.cast("type[Any]", kind))
        if name not in hints:
            group = ".".join(names[:depth]) or "the job"
            raise ConfigError(f"--set {path}: {group} has no {name!r}. {nearest_name(name, hints)}")
        kind = hints[name]
        if depth == len(names) - 1:
            data[name] = to_json(_parse(kind, text, path=path, from_text=True))
        else:
            data = data[name]


def _without_none(kind: Any) -> Any:
    """The X of X | None; else the type itself."""
    inner = [each for each in typing.get_args(kind) if each is not type(None)]
    is_optional = isinstance(kind, types.UnionType) and len(inner) == 1
    return inner[0] if is_optional else kind


def _field_types(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _required_fields(kind: type) -> list[str]:
    absent = dataclasses.MISSING
    return [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is absent and f.default_factory is absent
    ]


def _parse(kind: Any, value: Any, *, path: str, from_text: bool) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(
            typing.cast("type[Any]", kind), value, path=path, from_text=from_text
        )
    if origin is Literal:
        value = value.strip() if isinstance(value, str) else value
        if value not in arguments:
            raise ConfigError(f"{path}={value!r}: {nearest_name(str(value), map(str, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _parse_optional(arguments, value, path=path, from_text=from_text)
    if origin is tuple:
        return _parse_tuple(arguments, value, path=path, from_text=from_text)
    return _parse_scalar(kind, value, path=path, from_text=from_text)


def _parse_dataclass(kind: type[Any], value: Any, *, path: str, from_text: bool) -> Any:
    if from_text or not isinstance(value, Mapping):
        raise ConfigError(
            f"{path or kind.__name__}={value!r} is a group of settings. Set one of its fields: "
            f"{', '.join(f'{path}.{name}' for name in _field_types(kind))}."
        )
    entries = typing.cast("Mapping[str, Any]", value)
    hints = _field_types(kind)
    for name in entries:
        if name not in hints:
            raise ConfigError(
                f"{path or kind.__name__}: unknown key {name!r}. {nearest_name(name, hints)}"
            )
    if missing := [name for name in _required_fields(kind) if name not in entries]:
        raise ConfigError(f"{path or kind.__name__} lacks {', '.join(missing)}.")
    prefix = f"{path}." if path else ""
    return kind(
        **{
            name: _parse(hints[name], entry, path=prefix + name, from_text=False)
            for name, entry in entries.items()
        }
    )


def _parse_optional(arguments: tuple[Any, ...], value: Any, *, path: str, from_text: bool) -> Any:
    inner = [kind for kind in arguments if kind is not type(None)]
    if inner == [int, str]:  # a count, or a word in its place
        try:
            return _parse_scalar(int, value, path=path, from_text=from_text)
        except ConfigError:
            return _parse_scalar(str, value, path=path, from_text=from_text)
    if len(inner) != 1:
        raise TypeError(f"{path}: only X | None and int | str are supported, not {arguments}")
    if value is None or (from_text and value.strip().lower() == "none"):
        return None
    return _parse(inner[0], value, path=path, from_text=from_text)


def _parse_tuple(
    arguments: tuple[Any, ...], value: Any, *, path: str, from_text: bool
) -> tuple[Any, ...]:
    if from_text:
        value = [part.strip() for part in value.strip("()[]").split(",") if part.strip()]
    if not isinstance(value, list):
        raise ConfigError(f"{path}={value!r} is not a list. Write values separated by commas.")
    items = typing.cast("list[Any]", value)
    if len(arguments) != 2 or arguments[1] is not Ellipsis:
        raise TypeError(f"{path}: only tuple[X, ...] is a supported tuple")
    return tuple(_parse(arguments[0], item, path=path, from_text=from_text) for item in items)


def _parse_scalar(kind: Any, value: Any, *, path: str, from_text: bool) -> Any:
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        names = [each.value for each in kind]
        if not isinstance(value, str) or value.strip() not in names:
            raise ConfigError(f"{path}={value!r}: {nearest_name(str(value), names)}")
        return kind(value.strip())
    if not from_text:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is kind:
            return value
        raise ConfigError(f"{path}={value!r} is not {_KIND_NAMES[kind]}.")
    convert = _CONVERTERS.get(kind)
    if convert is None:
        raise TypeError(f"{path}: settings of type {kind} are not supported")
    try:
        return convert(value)
    except ValueError:
        raise ConfigError(f"{path}={value!r} is not {_KIND_NAMES[kind]}.") from None


def _to_bool(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.strip().lower()]
    except KeyError:
        raise ValueError(text) from None


def _to_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _to_int(text: str) -> int:
    return int(text.replace("_", ""))


_CONVERTERS: dict[Any, Callable[[str], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: str,
}
_KIND_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
}


def cache_folder() -> Path | None:
    """Where compiled schedules are kept: PLAIT_CACHE, or the user's cache; None if set to ""."""
    given = os.environ.get("PLAIT_CACHE")
    if given is not None:
        return Path(given) if given else None
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "plait" / "schedules"


def encode_on_one_thread() -> None:
    """Keep `tokenizers` from starting a thread for each core, in a process of which many run."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
