"""Find where NaN and Inf come from: the step that makes them of finite operands.

An Inf that the program writes itself (a mask filled with -inf) is not a finding, and neither is
what follows from an earlier one.
"""

import math
from dataclasses import dataclass, field

import torch

from plait.executor.observe import Sighting, makes_values, tensors_in
from plait.executor.statistics import describe_value
from plait.graph.schedule import Argument, Ref


class NotFiniteFound(BaseException):
    """Ends the run at the first NaN. Not an Exception, so that no program takes it for its own."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """kind: "NaN" or "Inf". input: the input of the program it came in with, or "" if made here.

    text: the step, the user's line, and statistics of what it took and made.
    """

    kind: str
    step: str
    operator: str
    input: str
    source: str
    text: str

    def __str__(self) -> str:
        """What was found, and where."""
        return self.text


@dataclass
class NotFiniteSearch:
    """Watches for a `Lookout`: give it `arrival` among its arrivals and `step` among its watches.

    Ends at the first NaN: raises NotFiniteFound there if `stop`, else looks no further.
    """

    stop: bool = True
    findings: list[Finding] = field(default_factory=list[Finding])
    arrived: set[str] = field(default_factory=set[str])

    @property
    def first_nan(self) -> Finding | None:
        """The origin of the first NaN."""
        return next((found for found in self.findings if found.kind == "NaN"), None)

    def arrival(self, sighting: Sighting) -> None:
        """Look at the inputs of a program that this step takes."""
        if sighting.place.calls or self.first_nan is not None:
            return
        for name, value in sighting.operands.items():
            if name in sighting.program.inputs:
                kind = _kind(value)
                if kind and name not in self.arrived:
                    self.arrived.add(name)
                    self._found(kind, sighting, name)

    def step(self, sighting: Sighting) -> None:
        """Look at what an operator made."""
        if self.first_nan is not None or not makes_values(sighting):
            return
        kind = _kind(sighting.value)
        if not kind:
            return
        given = [_kind(x) for x in sighting.operands.values()]
        step = sighting.place.step
        is_older = kind in given
        is_meant = kind == "Inf" and (any(given) or _has_inf((step.args, dict(step.kwargs))))
        if not is_older and not is_meant:
            self._found(kind, sighting, "")

    def _found(self, kind: str, sighting: Sighting, name: str) -> None:
        place = sighting.place
        known = sighting.input_names.get(name, name)
        head = f"{kind} came in with {known}, first taken by" if name else f"{kind} was made by"
        lines = [head, *(f"  {line}" for line in str(sighting).splitlines())]
        lines += [
            f"    took {each} = {describe_value(value)}"
            for each, value in sighting.operands.items()
            if not name or each == name
        ]
        lines += _constants(sighting)
        if not name:
            lines.append(f"    made {describe_value(sighting.value)}")
        self.findings.append(
            Finding(
                kind=kind,
                step=place.name,
                operator=place.step.target,
                input=known,
                source=place.step.source,
                text="\n".join(lines),
            )
        )
        if kind == "NaN" and self.stop:
            raise NotFiniteFound(place.name)

    def __str__(self) -> str:
        """All findings, up to the first NaN."""
        if not self.findings:
            return "No step made NaN, or Inf of finite values."
        return "\n\n".join(str(found) for found in self.findings)


@torch.no_grad()
def _kind(value: object) -> str:
    """NaN, Inf, or nothing of both."""
    kinds = set()
    for x in tensors_in(value):
        if (x.is_floating_point() or x.is_complex()) and not bool(x.isfinite().all()):
            kinds.add("NaN" if bool(x.isnan().any()) else "Inf")
    return min(kinds, key=["NaN", "Inf"].index, default="")


def _has_inf(argument: Argument) -> bool:
    if isinstance(argument, float):
        return math.isinf(argument)
    if isinstance(argument, dict):
        return any(_has_inf(item) for item in argument.values())
    return isinstance(argument, list | tuple) and any(_has_inf(item) for item in argument)


def _constants(sighting: Sighting) -> list[str]:
    """The step's plain arguments: often the culprit is an exponent or an epsilon."""
    step = sighting.place.step
    plain = [repr(x) for x in step.args if isinstance(x, int | float | list) and not _refers(x)]
    plain += [f"{key}={x!r}" for key, x in step.kwargs if x is not None and not _refers(x)]
    return [f"    with {', '.join(plain)}"] if plain else []


def _refers(x: Argument) -> bool:
    return isinstance(x, Ref) or (isinstance(x, list | tuple) and any(_refers(item) for item in x))
