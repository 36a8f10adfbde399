"""A schedule as JSON, and back. Nothing is pickled: steps name operators, constants are numbers."""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import cast

import numpy as np
import torch
from torch import Tensor

from plait.errors import GraphError
from plait.graph.graph import Full, Role, Value
from plait.graph.note import Note
from plait.graph.schedule import Argument, IslandProgram, Program, Ref, Schedule, Step

FORMAT = 4
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

_NAMED: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def to_json(schedule: Schedule) -> str:
    """Write a schedule. Raises GraphError if it holds something that has no name."""
    if schedule.objects:
        names = ", ".join(sorted(schedule.objects))
        raise GraphError(f"the schedule cannot be stored: it calls {names}, which have no name.")
    data: dict[str, Json] = {
        "format": FORMAT,
        "level": schedule.level,
        "is_step": schedule.is_step,
        "arguments": None if schedule.arguments is None else list(schedule.arguments),
        "num_micro_batches": schedule.num_micro_batches,
        "numerics": schedule.numerics,
        "notes": [asdict(note) for note in schedule.notes],
        "certificates": {**schedule.certificates},
        "groups": {**schedule.groups},
        "optimizer_inputs": [_value(value) for value in schedule.optimizer_inputs],
        "optimizer_settings": schedule.optimizer_settings,
        "inputs": [_value(value) for value in schedule.inputs],
        "outputs": [_value(value) for value in schedule.outputs],
        "saved": [_value(value) for value in schedule.saved],
        "weight_inputs": list(schedule.weight_inputs),
        "programs": [_program(program) for program in schedule.programs.values()],
        "templates": [_program(program) for program in schedule.templates.values()],
        "constants": {name: _tensor(x) for name, x in schedule.constants.items()},
        "islands": {name: _island(x) for name, x in schedule.islands.items()},
    }
    return json.dumps(data, separators=(",", ":"))


def from_json(text: str) -> Schedule:
    """Read what `to_json` wrote. Raises GraphError for anything else."""
    try:
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise GraphError(
                f"the schedule has format {data['format']}, this Plait reads {FORMAT}."
            )
        return Schedule(
            level=str(data["level"]),
            is_step=bool(data["is_step"]),
            arguments=_read_arguments(data.get("arguments")),
            num_micro_batches=int(data["num_micro_batches"]),
            numerics=str(data["numerics"]),
            notes=tuple(Note(**note) for note in data["notes"]),
            groups={str(k): int(v) for k, v in data["groups"].items()},
            certificates={str(k): str(v) for k, v in data["certificates"].items()},
            optimizer_inputs=tuple(_read_value(x) for x in data["optimizer_inputs"]),
            optimizer_settings=str(data["optimizer_settings"]),
            inputs=tuple(_read_value(x) for x in data["inputs"]),
            outputs=tuple(_read_value(x) for x in data["outputs"]),
            saved=tuple(_read_value(x) for x in data["saved"]),
            weight_inputs=tuple(str(x) for x in data["weight_inputs"]),
            programs={x["name"]: _read_program(x) for x in data["programs"]},
            templates={x["name"]: _read_program(x) for x in data["templates"]},
            constants={name: _read_tensor(x) for name, x in data["constants"].items()},
            islands={str(name): _read_island(x) for name, x in data["islands"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, GraphError):
            raise
        raise GraphError(f"this is not a stored schedule: {error!r}.") from error


def _read_arguments(data: list[Json] | None) -> tuple[str, ...] | None:
    return None if data is None else tuple(str(x) for x in data)


def _value(value: Value) -> Json:
    if not isinstance(value.layout, Full):
        raise GraphError(f"the schedule cannot be stored: {value.name} is split.")
    return [
        value.role.value,
        value.name,
        list(value.shape),
        list(value.stride),
        None if value.dtype is None else str(value.dtype),
        value.device,
    ]


def _read_value(data: list[Json]) -> Value:
    role, name, shape, stride, dtype, device = data
    return Value(
        role=Role(role),
        name=str(name),
        shape=tuple(cast("list[int]", shape)),
        stride=tuple(cast("list[int]", stride)),
        dtype=None if dtype is None else cast("torch.dtype", _torch_name("dtype", str(dtype))),
        device=str(device),
    )


def _program(program: Program) -> Json:
    return {
        "name": program.name,
        "inputs": list(program.inputs),
        "results": [_encode(x) for x in program.results],
        "steps": [
            [
                step.name,
                step.target,
                [_encode(x) for x in step.args],
                {key: _encode(x) for key, x in step.kwargs},
                list(step.frees),
                step.source,
            ]
            for step in program.steps
        ],
        "sums": [*sorted(program.sums)],
    }


def _island(island: IslandProgram) -> Json:
    takes: list[Json] = [_value(x) for x in island.takes]
    return {"program": _program(island.program), "takes": takes, "mode": island.mode}


def _read_island(data: dict[str, list[Json]]) -> IslandProgram:
    program = cast("dict[str, list[Json]]", data["program"])
    takes = tuple(_read_value(cast("list[Json]", x)) for x in data["takes"])
    mode = str(data["mode"])
    return IslandProgram(program=_read_program(program), takes=takes, mode=mode)


def _read_program(data: dict[str, list[Json]]) -> Program:
    steps = cast("list[list[Json]]", data["steps"])
    return Program(
        name=str(data["name"]),
        inputs=tuple(str(x) for x in data["inputs"]),
        results=tuple(_decode(x) for x in data["results"]),
        steps=tuple(_read_step(step) for step in steps),
        sums=frozenset(str(x) for x in data["sums"]),
    )


def _read_step(data: list[Json]) -> Step:
    name, target, args, kwargs, frees, source = data
    return Step(
        name=str(name),
        target=str(target),
        args=tuple(_decode(x) for x in cast("list[Json]", args)),
        kwargs=tuple((key, _decode(x)) for key, x in cast("dict[str, Json]", kwargs).items()),
        frees=tuple(str(x) for x in cast("list[Json]", frees)),
        source=str(source),
    )


def _encode(x: Argument) -> Json:
    """Numbers and strings as they are; everything else as {kind: content}."""
    if isinstance(x, Ref):
        return {"ref": x.name}
    if x is None or isinstance(x, (bool, int, str)):
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else {"float": repr(x)}
    if isinstance(x, complex):
        return {"complex": [x.real, x.imag]}
    if isinstance(x, tuple):
        return {"tuple": [_encode(item) for item in cast("tuple[Argument, ...]", x)]}
    if isinstance(x, list):
        return [_encode(item) for item in cast("list[Argument]", x)]
    if isinstance(x, Mapping):
        items = cast("Mapping[str, Argument]", x).items()
        return {"dict": {key: _encode(item) for key, item in items}}
    if isinstance(x, torch.device):
        return {"device": str(x)}
    for kind, python_type in _NAMED.items():
        if isinstance(x, python_type):
            return {kind: str(x)}
    raise GraphError(f"the schedule cannot be stored: an operand is a {type(x).__name__}.")


def _decode(x: Json) -> Argument:
    if isinstance(x, list):
        return [_decode(item) for item in x]
    if not isinstance(x, dict):
        return x
    ((kind, content),) = x.items()
    if kind == "ref":
        return Ref(str(content))
    if kind == "float":
        return float(str(content))
    if kind == "complex":
        return complex(*cast("list[float]", content))
    if kind == "tuple":
        return tuple(_decode(item) for item in cast("list[Json]", content))
    if kind == "dict":
        return {key: _decode(item) for key, item in cast("dict[str, Json]", content).items()}
    if kind == "device":
        return torch.device(str(content))
    return _torch_name(kind, str(content))


def _torch_name(kind: str, name: str) -> object:
    """The dtype, layout or memory format of that name, and nothing else of torch."""
    found = getattr(torch, name.removeprefix("torch."))
    if not isinstance(found, _NAMED[kind]):
        raise GraphError(f"{name} is no {kind} of torch.")
    return found


def _tensor(x: Tensor) -> Json:
    flat = x.detach().cpu().contiguous().flatten()
    content = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return [str(x.dtype), list(x.shape), str(x.device), base64.b64encode(content).decode()]


def _read_tensor(data: list[Json]) -> Tensor:
    dtype, shape, device, content = data
    content = np.frombuffer(base64.b64decode(str(content), validate=True), dtype=np.uint8).copy()
    flat = torch.as_tensor(content).view(cast("torch.dtype", _torch_name("dtype", str(dtype))))
    return flat.reshape(cast("list[int]", shape)).to(str(device))
