"""The compile cache: schedules on disk, looked up before anything is captured.

An entry is found by what the program is (its fingerprint, the form of its inputs, the modes, the
versions, the machine) and is used only if its checksum holds and every source file that it was made
from still has the content it had. Whatever fails is rebuilt.
"""

# pyright: basic
# (pytree is not typed.)

import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from plait.backend.fingerprint import Fingerprint
from plait.backend.reads import Read
from plait.backend.report import CapturedGraph
from plait.errors import GraphError
from plait.graph.modes import current_modes
from plait.graph.schedule import Schedule
from plait.graph.storage import from_json, to_json

_MAX_BYTES = 512 * 2**20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A stored schedule with the way from call to inputs, and from outputs to the return value.

    sources: for each input of the schedule, "t<number>" of the fingerprint's tensors or "a<number>"
    of the call's leaves. result: the return value as pytree JSON. leaves: "o<number>" of the
    schedule's outputs, "a..." and "t..." as above, or a plain constant. graph: what the report says
    of it. reads: what else the program read, with what was found there.
    """

    schedule: Schedule
    sources: list[str]
    result: str
    leaves: list
    graph: CapturedGraph
    reads: list[Read]


def call_form(args: tuple, kwargs: dict) -> tuple[list, str] | None:
    """The leaves of a call, and a text that equal forms of calls share; None if it has none."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    words = [str(spec)]
    for leaf in leaves:
        if type(leaf) in (Tensor, torch.nn.Parameter):
            form = (leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.device, leaf.requires_grad)
            words.append(str(form))
        elif isinstance(leaf, type(None) | bool | int | float | str):
            words.append(f"{type(leaf).__name__} {leaf!r}")
        else:
            return None
    same = {}
    words += [str(same.setdefault(id(x), i)) for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    state = (
        current_modes(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
    )
    return leaves, "\n".join([*words, str(state)])


def key_of(found: Fingerprint, form: str, level: str, dynamic: bool | None) -> str:
    """Name of the entry."""
    text = "\n".join([found.digest, form, level, str(dynamic), *_machine()])
    return hashlib.sha256(text.encode()).hexdigest()


def load(folder: Path, key: str) -> Entry | None:
    """The entry, if it is there, whole and made from the sources that are there now."""
    path = folder / f"{key}.json"
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        checksum, _, text = path.read_text().partition("\n")
        if checksum != hashlib.sha256(text.encode()).hexdigest():
            return None
        data = json.loads(text)
        if any(_hash_of(file) != digest for file, digest in data["files"].items()):
            return None
        return Entry(
            schedule=from_json(data["schedule"]),
            sources=data["sources"],
            result=data["result"],
            leaves=data["leaves"],
            graph=CapturedGraph(**data["graph"]),
            reads=[Read.from_json(read) for read in data["reads"]],
        )
    except (OSError, ValueError, KeyError, TypeError, SyntaxError, GraphError):
        return None  # rebuilt, and written anew


def save(folder: Path, key: str, entry: Entry, files: Iterable[str]) -> None:
    """Write the entry whole, or not at all."""
    data = {
        "files": {file: _hash_of(file) for file in sorted(files)},
        "schedule": to_json(entry.schedule),
        "sources": entry.sources,
        "result": entry.result,
        "leaves": entry.leaves,
        "graph": asdict(entry.graph),
        "reads": [read.to_json() for read in entry.reads],
    }
    text = json.dumps(data)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as file:
        file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    try:
        Path(file.name).replace(folder / f"{key}.json")
    except OSError:
        Path(file.name).unlink()
        raise


def _hash_of(file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError:
        return ""


@cache
def _machine() -> tuple[str, ...]:
    """Versions and machine: another one may choose other kernels, or read sources otherwise."""
    return (
        sys.version,
        torch.__version__,
        str(torch.version.cuda),
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        str(torch.cpu._is_avx512_bf16_supported()),
        str(torch.cpu._is_amx_tile_supported()),
        torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        own_sources(),
    )


def own_sources() -> str:
    """Hash of Plait itself."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
