"""The level table: which passes run, in which order. Read this first.

| level | passes | numbers |
|---|---|---|
| O0 | lift constants, identities, recompute by the plan; kernels in captured order | eager's bits |
| O1 | O0's order; loss, attention backward, save less, islands, each compiled once | `TOLERANCE` |
| O2 | as O1, but each program is one graph for Inductor, where its order is free | `TOLERANCE` |

At O1 and O2 an optimizer takes PyTorch's fused kernels where it has them. With numerics="strict",
and of a model that is strict itself, both run O0's kernels, and say so.

Where the plan wants replicas, `separate`, `merge collectives` and `replicas` run before recompute,
and `order` at the end (`replicate.py` says what they do together).

With numerics="strict", at any level, `strict numerics` runs first, on the graph as captured: what
comes after it sees operators whose rows do not depend on each other, and may split them.

A pass maps a graph and a plan to a graph. `compile.py` runs the passes of a level, parts forward
from backward, and lowers both to the steps of a schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass

from plait.compiler.attention_backward import quicken_attention
from plait.compiler.choose_replicas import choose_replicas
from plait.compiler.fuse import fuse, refuse_islands
from plait.compiler.fuse_loss import fuse_loss
from plait.compiler.identities import drop_identities
from plait.compiler.lift_constants import lift_constants
from plait.compiler.merge import merge
from plait.compiler.order import order
from plait.compiler.recompute import recompute
from plait.compiler.save_less import save_less
from plait.compiler.separate import separate
from plait.compiler.spread_late import spread_late
from plait.compiler.strict import is_strict, strict_numerics
from plait.compiler.whole_program import whole_programs
from plait.cost.clusters import Cluster
from plait.errors import GraphError, nearest_name
from plait.graph.graph import Graph
from plait.ops.numerics import Numerics
from plait.plan.parallel_plan import ParallelPlan


@dataclass(frozen=True)
class Pass:
    """A step from graph to graph.

    exact: the numbers keep their bits. Else each value of the graph lies within `tolerance` of what
    it was, in units of the dtype's spacing at 1, relative to the largest of its tensor. moves: it
    splits, merges or moves collectives or random operators, or takes constants out of them; others
    keep them as they are, in their order. if_strict: what runs instead on a strict graph, whose
    rows' bits the pass would change.
    """

    name: str
    run: Callable[[Graph, ParallelPlan, Cluster], Graph]
    exact: bool = True
    tolerance: float = 0.0
    moves: bool = False
    if_strict: Callable[[Graph], Graph] | None = None

    def __call__(self, graph: Graph, plan: ParallelPlan, cluster: Cluster) -> Graph:
        """Run the pass. Its graph is the caller's from now on, as it was or rewritten."""
        if self.if_strict is not None and is_strict(graph):
            return self.if_strict(graph)
        return self.run(graph, plan, cluster)


def as_it_is(graph: Graph) -> Graph:
    """What a pass does that does nothing."""
    return graph


TOLERANCE = 64.0

LIFT_CONSTANTS = Pass(
    "lift constants", lambda graph, plan, cluster: lift_constants(graph), moves=True
)
IDENTITIES = Pass("identities", lambda graph, plan, cluster: drop_identities(graph))
RECOMPUTE = Pass("recompute", lambda graph, plan, cluster: recompute(graph, plan.recompute))

SPREAD_LATE = Pass("spread late", lambda graph, plan, cluster: spread_late(graph))
SEPARATE = Pass("separate", lambda graph, plan, cluster: separate(graph), moves=True)
MERGE = Pass(
    "merge collectives", lambda graph, plan, cluster: merge(graph), False, TOLERANCE, moves=True
)
REPLICAS = Pass("replicas", choose_replicas, False, TOLERANCE, moves=True)
ORDER = Pass("order", lambda graph, plan, cluster: order(graph, cluster), moves=True)
STRICT = Pass(
    "strict numerics", lambda graph, plan, cluster: strict_numerics(graph), False, TOLERANCE
)

LOSS = Pass(
    "loss without logits",
    lambda graph, plan, cluster: fuse_loss(graph),
    False,
    TOLERANCE,
    if_strict=as_it_is,
)
ATTENTION = Pass(
    "attention backward",
    lambda graph, plan, cluster: quicken_attention(graph),
    False,
    TOLERANCE,
    if_strict=as_it_is,
)
SAVE_LESS = Pass(
    "save less",
    lambda graph, plan, cluster: save_less(graph, plan.recompute),
    if_strict=as_it_is,
)
ISLANDS = Pass(
    "islands",
    lambda graph, plan, cluster: fuse(graph),
    False,
    TOLERANCE,
    if_strict=refuse_islands,
)
WHOLE = Pass(
    "whole programs",
    lambda graph, plan, cluster: whole_programs(graph, plan),
    False,
    TOLERANCE,
    if_strict=refuse_islands,
)

NUMERICS: dict[str, tuple[Pass, ...]] = {"fast": (), "strict": (STRICT,)}

LEVELS: dict[str, tuple[Pass, ...]] = {
    "O0": (LIFT_CONSTANTS, IDENTITIES, SPREAD_LATE, SEPARATE, MERGE, REPLICAS, RECOMPUTE, ORDER),
    "O1": (
        LIFT_CONSTANTS,
        IDENTITIES,
        SPREAD_LATE,
        SEPARATE,
        MERGE,
        REPLICAS,
        LOSS,
        ATTENTION,
        SAVE_LESS,
        RECOMPUTE,
        ORDER,
        ISLANDS,
    ),
    "O2": (
        LIFT_CONSTANTS,
        IDENTITIES,
        SPREAD_LATE,
        SEPARATE,
        MERGE,
        REPLICAS,
        LOSS,
        ATTENTION,
        SAVE_LESS,
        RECOMPUTE,
        ORDER,
        WHOLE,
    ),
}
HIDING = (SPREAD_LATE, SEPARATE, MERGE, REPLICAS, ORDER)
"""Those that run only where the plan wants replicas."""


def passes_of(
    level: str, numerics: Numerics = "fast", plan: ParallelPlan | None = None
) -> tuple[Pass, ...]:
    """The passes of a level, for a plan.

    Raises GraphError if there is no such level, or no such numerics.
    """
    if level not in LEVELS:
        raise GraphError(f"there is no level {level!r}. {nearest_name(str(level), LEVELS)}")
    if numerics not in NUMERICS:
        raise GraphError(f"there are no numerics {numerics!r}. {nearest_name(numerics, NUMERICS)}")
    hides = plan is not None and plan.replicas != 1
    passes = NUMERICS[numerics] + LEVELS[level]
    return tuple(each for each in passes if hides or each not in HIDING)


def has_islands(level: str) -> bool:
    """Whether the level makes kernels of its own. Raises GraphError if there is no such level."""
    return not {ISLANDS, WHOLE}.isdisjoint(passes_of(level))
