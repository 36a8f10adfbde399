"""The level table: which passes run, in which order. Read this first.

| level | passes | numbers |
|---|---|---|
| O0 | lift constants, recompute by the plan; kernel by kernel in captured order | eager's bits |

With numerics="strict", at any level, `strict numerics` runs first, on the graph as captured: what
comes after it sees operators whose rows do not depend on each other, and may split them.

A pass maps a graph and a plan to a graph. `compile.py` runs the passes of a level, parts forward
from backward, and lowers both to the steps of a schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass

from plait.compiler.lift_constants import lift_constants
from plait.compiler.recompute import recompute
from plait.compiler.strict import strict_numerics
from plait.errors import GraphError, nearest_name
from plait.graph.graph import Graph
from plait.ops.numerics import Numerics
from plait.plan.parallel_plan import ParallelPlan


@dataclass(frozen=True)
class Pass:
    """A step from graph to graph.

    exact: the numbers keep their bits. Else each value of the graph lies within `tolerance` of what
    it was, in units of the dtype's spacing at 1, relative to the largest of its tensor.
    """

    name: str
    run: Callable[[Graph, ParallelPlan], Graph]
    exact: bool = True
    tolerance: float = 0.0


TOLERANCE = 64.0

LIFT_CONSTANTS = Pass("lift constants", lambda graph, plan: lift_constants(graph))
RECOMPUTE = Pass("recompute", lambda graph, plan: recompute(graph, plan.recompute))

STRICT = Pass("strict numerics", lambda graph, plan: strict_numerics(graph), False, TOLERANCE)

NUMERICS: dict[str, tuple[Pass, ...]] = {"fast": (), "strict": (STRICT,)}

LEVELS: dict[str, tuple[Pass, ...]] = {
    "O0": (LIFT_CONSTANTS, RECOMPUTE),
}


def passes_of(level: str, numerics: Numerics = "fast") -> tuple[Pass, ...]:
    """The passes of a level. Raises GraphError if there is no such level, or no such numerics."""
    if level not in LEVELS:
        raise GraphError(f"there is no level {level!r}. {nearest_name(str(level), LEVELS)}")
    if numerics not in NUMERICS:
        raise GraphError(f"there are no numerics {numerics!r}. {nearest_name(numerics, NUMERICS)}")
    return NUMERICS[numerics] + LEVELS[level]
