"""The level table: which passes run, in which order. Read this first.

| level | passes | numbers |
|---|---|---|
| O0 | none beyond the recompute policy; kernel by kernel, in captured order | eager's, bit for bit |
"""

from collections.abc import Callable
from dataclasses import dataclass

from plait.errors import GraphError, nearest_name
from plait.graph.graph import Graph

Run = Callable[[Graph], Graph]


@dataclass(frozen=True)
class Pass:
    """A step from graph to graph. exact: the numbers keep their bits; else within `tolerance`."""

    name: str
    run: Run
    exact: bool = True
    tolerance: float = 0.0


LEVELS: dict[str, tuple[Pass, ...]] = {
    "O0": (),
}


def passes_of(level: str) -> tuple[Pass, ...]:
    """The passes of a level. Raises GraphError if there is no such level."""
    if level not in LEVELS:
        raise GraphError(f"there is no level {level!r}. {nearest_name(str(level), LEVELS)}")
    return LEVELS[level]
