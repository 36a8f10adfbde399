"""A Prior as TOML for people and as JSON beside its network."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.errors import InversionError, nearest_name
from plait.magnetotellurics.prior import Bumps, Layer, Prior, Range

_MAX_BYTES = 1_000_000


def read_prior(path: str | Path) -> Prior:
    """Read a prior from a TOML file.

    A range is a list [low, high] or one number. Tables: [[layer]] for each layer in the order of
    painting, [bumps]; the other keys are those of Prior.

    Raises:
        InversionError: not TOML, a key that does not exist, a value of the wrong kind; with the
            file's name.
    """
    path = Path(path)
    if path.stat().st_size > _MAX_BYTES:
        raise InversionError(f"{path}: over {_MAX_BYTES} bytes is not a prior")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InversionError(f"{path}: not TOML: {error}") from error
    try:
        return prior_from_table(table)
    except InversionError as error:
        raise InversionError(f"{path}: {error}") from error


def prior_from_table(table: Mapping[str, Any]) -> Prior:
    """Make a prior of nested tables, as of TOML or JSON.

    Raises:
        InversionError: as read_prior.
    """
    plain = dict(table)
    layers = plain.pop("layer", [])
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise InversionError("layer must be a list of tables, [[layer]]")
    made = tuple(_make(Layer, layer, f"layer {number}") for number, layer in enumerate(layers, 1))
    bumps = plain.pop("bumps", {})
    if not isinstance(bumps, dict):
        raise InversionError("bumps must be a table, [bumps]")
    if "layers" in plain:
        raise InversionError("layers are given as tables [[layer]]")
    return _make(Prior, plain, "the prior", layers=made, bumps=_make(Bumps, bumps, "bumps"))


def prior_to_table(prior: Prior) -> dict[str, Any]:
    """Give plain lists and tables from which prior_from_table makes the same prior."""
    table: dict[str, Any] = {}
    for field in dataclasses.fields(prior):
        value = getattr(prior, field.name)
        if field.name == "layers":
            table["layer"] = [_plain(layer) for layer in value]
        elif field.name == "bumps":
            table["bumps"] = _plain(value)
        else:
            table[field.name] = _number_or_list(value)
    return table


def _plain(part: Layer | Bumps) -> dict[str, Any]:
    given = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {name: _number_or_list(value) for name, value in given.items() if value is not None}


def _number_or_list(value: Any) -> Any:
    return [value.low, value.high] if isinstance(value, Range) else value


def _make(kind: type, table: Mapping[str, Any], where: str, **ready: Any) -> Any:
    """Fill a dataclass from a table, with the types of its fields."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in ready}
    values = dict(ready)
    for name, value in table.items():
        if name not in fields:
            raise InversionError(f"{where}: no key {name!r}. {nearest_name(name, fields)}")
        values[name] = _typed(value, str(fields[name].type), f"{where}: {name}")
    lost = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if lost:
        raise InversionError(f"{where}: {', '.join(lost)} must be given")
    return kind(**values)


def _typed(value: Any, wanted: str, where: str) -> Any:
    if "Range" in wanted:
        pair = value if isinstance(value, list) else [value, value]
        if len(pair) != 2 or not all(_is_number(v) for v in pair):
            raise InversionError(f"{where} must be a number or [low, high], not {value!r}")
        return Range(float(pair[0]), float(pair[1]))
    if "str" in wanted:
        if not isinstance(value, str):
            raise InversionError(f"{where} must be text, not {value!r}")
        return value
    if not _is_number(value):
        raise InversionError(f"{where} must be a number, not {value!r}")
    if "int" in wanted and value != int(value):
        raise InversionError(f"{where} must be a whole number, not {value!r}")
    return int(value) if "int" in wanted else float(value)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
