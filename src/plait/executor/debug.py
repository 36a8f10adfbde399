"""Stop at a step and look at it, write its tensors to files, list what runs.

Each of these is a watch of a `Lookout` (observe.py). not_finite.py, record.py and compare.py are
further ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from plait.errors import GraphError, nearest_name
from plait.executor.observe import Sighting, tensors_in
from plait.executor.statistics import describe_value
from plait.graph.place import Place, walk
from plait.graph.schedule import Schedule

_NUM_NAMED = 12


@dataclass
class Breakpoint:
    """Calls `callback` with each step that has run and is meant by `where`.

    where: the name of a step ("addmm_1"), of one place ("forward/block_1_forward_1/addmm"), a
    pattern of those ("forward/*/addmm*"), or a source line ("model.py:12").
    """

    where: str
    callback: Callable[[Sighting], None]
    num_hits: int = 0

    def watch(self, sighting: Sighting) -> None:
        """Call back if this is the step."""
        if is_meant(self.where, sighting.place):
            self.num_hits += 1
            self.callback(sighting)


@dataclass
class Dump:
    """Write what steps took and made into `folder`, one safetensors file for each step.

    patterns: as `Breakpoint.where`. Tensors are called `result` (`result.0`, ...) and
    `operand.<name>`, so that a step can be run again by itself; the metadata name the step.
    """

    folder: Path
    patterns: tuple[str, ...] = ("*",)
    files: list[Path] = field(default_factory=list)

    def watch(self, sighting: Sighting) -> None:
        """Write the step if a pattern means it."""
        if not any(is_meant(pattern, sighting.place) for pattern in self.patterns):
            return
        results = tensors_in(sighting.value)
        if not results:
            return
        numbered = len(results) > 1
        tensors = {f"result.{i}" if numbered else "result": x for i, x in enumerate(results)}
        for name, value in sighting.operands.items():
            tensors |= {f"operand.{name}": x for x in tensors_in(value)}
        self.folder.mkdir(parents=True, exist_ok=True)
        name = sighting.place.name.replace("/", ".")
        path = self.folder / f"{len(self.files):05}-{name}.safetensors"
        save_file({key: _own_copy(x) for key, x in tensors.items()}, path, _metadata(sighting))
        self.files.append(path)


@dataclass
class Listing:
    """Hand `write` a line for each operator in the first run of each program."""

    write: Callable[[str], None]
    _where: str = ""

    def watch(self, sighting: Sighting) -> None:
        """Write the step's line, under a title where the program or call changes."""
        place = sighting.place
        if sighting.run > 1 or not place.is_operator:
            return
        where = f"{place.where}{' of ' * bool(sighting.graph)}{sighting.graph}"
        if where != self._where:
            self._where = where
            self.write(where)
        self.write(f"  {place.step.name} = {place.step.target}: {describe_value(sighting.value)}")
        if place.step.source:
            self.write(f"      {place.step.source}")


def is_meant(pattern: str, place: Place) -> bool:
    """Whether a step's name, place, template place or source line is meant."""
    file, _, line = pattern.rpartition(":")
    if file and line.isdigit():
        known_file, _, rest = place.step.source.partition(", in ")[0].rpartition(":")
        return rest == line and ("/" + known_file).endswith("/" + file)
    names = [place.step.name, place.name]
    names += [f"{call.template}/{place.step.name}" for call in place.calls[-1:]]
    return any(fnmatchcase(name, pattern) for name in names)


def check_is_known(pattern: str, schedules: list[Schedule]) -> None:
    """Raise GraphError, with what might be meant, if no step of the schedules is."""
    places = [place for schedule in schedules for place in walk(schedule)]
    if any(is_meant(pattern, place) for place in places):
        return
    if not places:
        raise GraphError(
            "no compiled program was loaded. Use plait.jit or torch.compile(backend='plait') in it."
        )
    if pattern.rpartition(":")[2].isdigit():
        lines = dict.fromkeys(place.step.source.partition(", in ")[0] for place in places)
        known = ", ".join(list(filter(None, lines))[:_NUM_NAMED])
        raise GraphError(f"no step comes from {pattern!r}. Lines that steps come from: {known}.")
    names = {place.step.name for place in places}
    nearest = nearest_name(pattern.rpartition("/")[2], names).partition("Known: ")
    known = ", ".join([place.name for place in places if place.is_operator][:_NUM_NAMED])
    raise GraphError(f"no step is called {pattern!r}. {nearest[0]}The first are: {known}.")


def _own_copy(x: Tensor) -> Tensor:
    x = torch.view_as_real(x) if x.is_complex() else x
    return x.detach().cpu().clone().contiguous()


def _metadata(sighting: Sighting) -> dict[str, str]:
    step = sighting.place.step
    return {
        "step": sighting.place.name,
        "operator": step.target,
        "arguments": repr((step.args, dict(step.kwargs))),
        "source": step.source,
        "where": sighting.place.where,
        "run": str(sighting.run),
        "graph": sighting.graph,
    }
