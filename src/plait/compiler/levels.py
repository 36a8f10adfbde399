"""The level table: which passes run, in which order. Read this first.

| level | passes | numbers |
|---|---|---|
| O0 | lift constants, recompute by the plan; kernel by kernel in captured order | eager's bits |

A pass maps a graph and a plan to a graph. `compile.py` runs the passes of a level, parts forward
from backward, and lowers both to the steps of a schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass

from plait.compiler.lift_constants import lift_constants
from plait.compiler.recompute import recompute
from plait.errors import GraphError, nearest_name
from plait.graph.graph import Graph
from plait.plan.parallel_plan import ParallelPlan


@dataclass(frozen=True)
class Pass:
    """A step from graph to graph. exact: the numbers keep their bits; else within `tolerance`."""

    name: str
    run: Callable[[Graph, ParallelPlan], Graph]
    exact: bool = True
    tolerance: float = 0.0


LIFT_CONSTANTS = Pass("lift constants", lambda graph, plan: lift_constants(graph))
RECOMPUTE = Pass("recompute", lambda graph, plan: recompute(graph, plan.recompute))

LEVELS: dict[str, tuple[Pass, ...]] = {
    "O0": (LIFT_CONSTANTS, RECOMPUTE),
}


def passes_of(level: str) -> tuple[Pass, ...]:
    """The passes of a level. Raises GraphError if there is no such level."""
    if level not in LEVELS:
        raise GraphError(f"there is no level {level!r}. {nearest_name(str(level), LEVELS)}")
    return LEVELS[level]
