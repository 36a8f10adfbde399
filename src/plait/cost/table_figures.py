"""Figures of a table of times, checked where they are read: a table is a file that anyone may edit.

Each function takes what JSON holds and the field's name, and raises PlanError that says both where
the figure is none that a measurement could have made.
"""

from reprlib import repr as repr_of  # short, however much a file holds
from typing import Any, cast

from plait.cost.clusters import Device
from plait.cost.table_entry import Entry, dtype_named
from plait.errors import PlanError

_LEAST_LAUNCH_S, _MOST_LAUNCH_S = -1e-3, 1.0
"""A clock that each operator reads takes microseconds; a launch by a slow host, milliseconds."""
_MOST_SPREAD = 100.0
"""A logarithm, whose exponential must be a number too."""
_TINY = 5e-324  # the least float above zero
_HUGE = 1.7e308


def positive(given: Any, name: str) -> float:
    """A finite number above zero."""
    return _number(given, name, _TINY, _HUGE, "must be a finite number above zero")


def not_negative(given: Any, name: str) -> float:
    """A finite number, zero or more."""
    return _number(given, name, 0.0, _HUGE, "must be a finite number, zero or more")


def spread(given: Any, name: str) -> float:
    """How far times are off: a logarithm."""
    wanted = f"is a logarithm of times and must be from 0 to {_MOST_SPREAD:g}"
    return _number(given, name, 0.0, _MOST_SPREAD, wanted)


def launch(given: Any, entries: tuple[Entry, ...]) -> float:
    """What a launch takes beside its operator: slightly negative where the clock takes longer."""
    wanted = (
        f"must be from {_LEAST_LAUNCH_S:g} to {_MOST_LAUNCH_S:g} s: it is added to every operator, "
        "and below zero it takes off what a clock takes, microseconds"
    )
    launch_s = _number(given, "launch_s", _LEAST_LAUNCH_S, _MOST_LAUNCH_S, wanted)
    if entries and -launch_s >= max(each.seconds for each in entries):
        raise _refusal("launch_s", given, "makes every operator that was measured free")
    return launch_s


def times_by_name(given: Any, name: str) -> dict[str, float]:
    """Times, zero or more, by operator."""
    return {key: not_negative(x, f"{name}[{key!r}]") for key, x in _mapping(given, name).items()}


def factors_by_name(given: Any, name: str) -> dict[str, float]:
    """Factors of times, by kind of operator."""
    return {key: positive(x, f"{name}[{key!r}]") for key, x in _mapping(given, name).items()}


def device_of(given: Any) -> Device:
    """The device's figures."""
    data = dict(_mapping(given, "device"))
    peaks = {
        dtype_named(key): positive(x, f"device.peak_flops_per_s[{key!r}]")
        for key, x in _mapping(data.pop("peak_flops_per_s"), "device.peak_flops_per_s").items()
    }
    if dtype_named("float32") not in peaks:
        wanted = "must have torch.float32, which stands for every dtype that is not listed"
        raise _refusal("device.peak_flops_per_s", list(map(str, peaks)), wanted)
    name, launch_s = _text(data.pop("name"), "device.name"), data.pop("launch_s")
    memory_bytes = _whole(data.pop("memory_bytes"), "device.memory_bytes", least=1)
    workspace = _whole(data.pop("blas_workspace_bytes"), "device.blas_workspace_bytes", least=0)
    figures = {key: positive(x, f"device.{key}") for key, x in data.items()}
    return Device(
        name=name,
        peak_flops_per_s=peaks,
        memory_bytes=memory_bytes,
        launch_s=not_negative(launch_s, "device.launch_s"),
        blas_workspace_bytes=workspace,
        **figures,
    )


def entry_of(given: Any) -> Entry:
    """One measured operator."""
    data = dict(_mapping(given, "entry"))
    data["sizes"] = tuple(data["sizes"])
    entry = Entry(**data)
    where = f"of the entry {entry.key!r}"
    for name in ("key", "operator", "dtype"):
        _text(getattr(entry, name), f"{name} {where}")
    for name in ("flops", "bytes", "pieces"):
        _whole(getattr(entry, name), f"{name} {where}", least=0)
    if len(entry.sizes) not in (0, 3):
        raise _refusal(
            f"sizes {where}", list(entry.sizes), "must be none, or the three of a product"
        )
    for size in entry.sizes:
        _whole(size, f"sizes {where}", least=1)
    for name in ("low_s", "seconds", "high_s"):
        _number(getattr(entry, name), f"{name} {where}", -_HUGE, _HUGE, "must be a finite number")
    dtype_named(entry.dtype)
    if not 0 < entry.low_s <= entry.seconds <= entry.high_s:
        raise PlanError(
            f"the table's entry {entry.key!r} has the times {entry.low_s!r}, {entry.seconds!r} and "
            f"{entry.high_s!r} s: they must be positive and in this order. Calibrate again."
        )
    return entry


def _number(given: Any, name: str, least: float, most: float, wanted: str) -> float:
    # True is an int of Python; NaN, and an int beyond any float, are not between the two.
    is_number = isinstance(given, int | float) and not isinstance(given, bool)
    if not is_number or not least <= given <= most:
        raise _refusal(name, given, wanted)
    return float(given)


def _whole(given: Any, name: str, *, least: int) -> int:
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise _refusal(name, given, f"must be a whole number from {least}")
    return given


def _text(given: Any, name: str) -> str:
    if not isinstance(given, str):
        raise _refusal(name, given, "must be text")
    return given


def _mapping(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise _refusal(name, given, "must be an object with names")
    return cast("dict[str, Any]", given)


def _refusal(name: str, given: Any, wanted: str) -> PlanError:
    return PlanError(f"the table's {name} is {repr_of(given)}: it {wanted}. Calibrate again.")
