"""Record what every step of a run made, and compare two recordings step by step."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plait.errors import GraphError
from plait.executor.debug import is_meant
from plait.executor.observe import Lookout, Sighting, tensors_in
from plait.executor.outcome import outcome_of
from plait.executor.run import Runnable
from plait.executor.statistics import describe_value
from plait.graph.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a step made. step: the name of its place. run: which run of its program, from 1.

    graph: which of several schedules it is of.
    """

    step: str
    run: int
    graph: str = ""
    operator: str
    where: str
    source: str
    tensors: tuple[Tensor, ...] = field(repr=False)


_NAMES = ("step", "run", "graph", "operator", "where", "source")


@dataclass
class Recording:
    """Copies of the results of the steps meant by `pattern` (see `Breakpoint`), in order."""

    pattern: str = "*"
    records: list[Record] = field(default_factory=list[Record])

    def watch(self, sighting: Sighting) -> None:
        """Keep a copy, on the CPU."""
        place = sighting.place
        tensors = tensors_in(sighting.value)
        if not tensors or not place.is_operator or not is_meant(self.pattern, place):
            return
        self.records.append(
            Record(
                step=place.name,
                run=sighting.run,
                graph=sighting.graph,
                operator=place.step.target,
                where=place.where,
                source=place.step.source,
                tensors=tuple(x.detach().cpu().clone().contiguous() for x in tensors),
            )
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors, about = {}, []
        for i, each in enumerate(self.records):
            tensors |= {f"{i}.{j}": x for j, x in enumerate(each.tensors)}
            about.append([getattr(each, name) for name in _NAMES])
        save_file(tensors, path, {"pattern": self.pattern, "records": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> "Recording":
        """Read what `save` wrote. Raises GraphError if the file is something else."""
        try:
            opened = safe_open(path, framework="pt")  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise GraphError(f"{path} is no recording: {error}.") from error
        with opened as file:
            about = file.metadata() or {}
            if about.keys() != {"pattern", "records"}:
                raise GraphError(f"{path} is no recording of `plait debug --record`.")
            tensors: list[list[Tensor]] = [[] for _ in json.loads(about["records"])]
            keys = [tuple(map(int, key.split("."))) for key in file.keys()]  # noqa: SIM118
            for i, j in sorted(keys):
                tensors[i].append(file.get_tensor(f"{i}.{j}"))
        rows = zip(json.loads(about["records"]), tensors, strict=True)
        records = [
            Record(**dict(zip(_NAMES, row, strict=True)), tensors=tuple(each)) for row, each in rows
        ]
        return cls(about["pattern"], records)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A step that made something else. largest: the largest absolute difference; NaN of forms."""

    first: Record
    second: Record
    largest: float

    def __str__(self) -> str:
        """The step, the user's line, and statistics of both results."""
        lines = [
            f"{self.first.step} = {self.first.operator}",
            f"  in {self.first.where}, run {self.first.run}",
            f"  from {self.first.source}" if self.first.source else "",
            f"    first  {describe_value(self.first.tensors)}",
            f"    second {describe_value(self.second.tensors)}",
            f"    largest difference {self.largest:.4g}",
        ]
        return "\n".join(filter(None, lines))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Differences in the order of the first run, and the steps that only one of the runs has."""

    num_equal: int
    differences: tuple[Difference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def __str__(self) -> str:
        """How many differ, and the first of them."""
        differ = len(self.differences)
        lines = [f"{self.num_equal} steps made the same, {differ} something else"]
        for which, names in (("first", self.only_first), ("second", self.only_second)):
            if names:
                lines.append(f"{len(names)} steps are only in the {which} run: {names[0]}, ...")
        if differ:
            lines += ["the first that differs:", *str(self.differences[0]).splitlines()]
        return "\n".join(lines)


def record(
    schedule: Schedule,
    *inputs: Tensor,
    tangents: Sequence[Tensor] | None = None,
    pattern: str = "*",
) -> Recording:
    """Run a schedule forward, and backward if it has one, and record its steps."""
    recording = Recording(pattern)
    runnable = Runnable(schedule, Lookout(schedule, [recording.watch]))
    outcome_of(runnable, inputs, tangents=tangents)
    return recording


def compare(
    first: Recording, second: Recording, *, rtol: float = 0.0, atol: float = 0.0
) -> Comparison:
    """Compare the steps that both runs have, by the names of their places, run and graph.

    Bit for bit, or within atol + rtol * (largest element of the first) where one is given.
    """
    others = {(each.graph, each.step, each.run): each for each in second.records}
    differences, num_equal, only_first = [], 0, []
    for each in first.records:
        other = others.pop((each.graph, each.step, each.run), None)
        if other is None:
            only_first.append(each.step)
            continue
        if are_equal(each.tensors, other.tensors, rtol=rtol, atol=atol):
            num_equal += 1
        else:
            largest = largest_difference(each.tensors, other.tensors)
            differences.append(Difference(first=each, second=other, largest=largest))
    return Comparison(
        num_equal=num_equal,
        differences=tuple(differences),
        only_first=tuple(only_first),
        only_second=tuple(each.step for each in others.values()),
    )


def are_equal(
    first: Sequence[Tensor], second: Sequence[Tensor], *, rtol: float = 0.0, atol: float = 0.0
) -> bool:
    """Whether forms are equal and values too: bit for bit, or within the tolerance if one is given.

    A NaN is equal to itself.
    """
    if [(x.shape, x.dtype) for x in first] != [(x.shape, x.dtype) for x in second]:
        return False
    pairs = zip(first, second, strict=True)
    return all(_is_equal(x, y, rtol, atol) for x, y in pairs)


def largest_difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest absolute difference of two elements; NaN if forms differ or either is NaN."""
    if [x.shape for x in first] != [x.shape for x in second]:
        return float("nan")
    found = [0.0]
    for x, y in zip(first, second, strict=True):
        wide = torch.complex128 if x.is_complex() or y.is_complex() else torch.float64
        if x.numel():
            found.append((x.to(wide) - y.to(wide)).abs().max().item())
    return float(torch.tensor(found).max())


def bits_of(x: Tensor) -> Tensor:
    """The bytes of a tensor's elements in order, on the CPU."""
    x = x.detach().cpu().contiguous().flatten()
    return x.view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)


def _is_equal(x: Tensor, y: Tensor, rtol: float, atol: float) -> bool:
    is_exact = (not rtol and not atol) or not (x.is_floating_point() or x.is_complex())
    if is_exact:
        return torch.equal(bits_of(x), bits_of(y))
    finite = x[x.isfinite()].abs()
    scale = finite.max().item() if finite.numel() else 0.0
    return torch.allclose(x, y, rtol=0.0, atol=atol + rtol * scale, equal_nan=True)
