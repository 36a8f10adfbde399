"""How many replicas, and how large: what the plan says, and what the cost model finds best."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from plait.compiler.order import Machine, Ordered, estimated_s, machine_of, order_pieces
from plait.compiler.refute import Trials
from plait.compiler.replicate import Replicated, replicate
from plait.cost.clusters import Cluster
from plait.errors import PlanError
from plait.graph.graph import Graph
from plait.graph.note import Note, gathered
from plait.plan.parallel_plan import ParallelPlan

NAME = "replicas"
CANDIDATES = (2, 3, 4)
SHARES: dict[int, tuple[tuple[int, ...], ...]] = {3: ((), (5, 7, 4)), 4: ((), (1, 2, 3, 2))}
"""Sizes of parts that are tried; () is equal. The first sum of a part hides behind what comes after
it, the last of the last behind little, so those in the middle may be larger. Rounded from what a
search over sizes found for Llama 70B and 405B (`benchmarks/overlap_price.py`)."""


@dataclass(frozen=True)
class Split:
    """A graph in replicas, and what the cost model says of it, once it is asked."""

    found: Replicated
    machine: Machine

    @cached_property
    def ordered(self) -> tuple[Graph, dict[str, Ordered]]:
        """The graph in its order, and each of its programs."""
        return order_pieces(self.found.graph, self.machine)

    @property
    def duration_s(self) -> float:
        """Time of a step."""
        return estimated_s(*self.ordered)


def best_split(
    graph: Graph,
    num_replicas: int,
    machine: Machine,
    *,
    axis: str | None = None,
    causal_split: bool = False,
    trials: Trials | None = None,
) -> Split:
    """Split a graph in so many replicas, with the best of some sizes.

    axis, causal_split, trials, and what is raised: see `replicate`.
    """
    how: Any = {"axis": axis, "causal_split": causal_split, "trials": trials or Trials()}
    splits: dict[tuple[tuple[int, ...], ...], Split] = {}
    for shares in SHARES.get(num_replicas, ((),)):
        found = replicate(graph, num_replicas, shares=shares, **how)
        sizes = tuple(each.sizes for each in found.parts.values())
        splits.setdefault(sizes, Split(found, machine))
    only, *others = splits.values()
    return min(splits.values(), key=lambda each: each.duration_s) if others else only


def choose_replicas(graph: Graph, plan: ParallelPlan, cluster: Cluster) -> Graph:
    """Split the graph in as many replicas as the plan says.

    "auto" tries each number on the cost model and keeps the best, which may be one; the notes say
    what each would take. Raises PlanError if an explicit number cannot be had.
    """
    if plan.replicas_by_piece is not None:
        how: Any = {"causal_split": plan.causal_split}
        return noted(replicate(graph, plan.replicas_by_piece, **how))
    machine = machine_of(graph, cluster)
    if isinstance(plan.replicas, int):
        return noted(
            best_split(graph, plan.replicas, machine, causal_split=plan.causal_split).found
        )
    best, best_s = graph, estimated_s(*order_pieces(graph, machine))
    tried, trials = [_tried(1, best_s)], Trials()
    for number in CANDIDATES:
        try:
            split = best_split(
                graph, number, machine, causal_split=plan.causal_split, trials=trials
            )
        except PlanError as error:
            tried.append(
                Note(by=NAME, operator="graph", node="root", text=str(error), is_refusal=True)
            )
            continue
        tried.append(_tried(number, split.duration_s))
        if split.duration_s < best_s:
            best, best_s = noted(split.found), split.duration_s
    return replace(best, notes=(*best.notes, *tried))


def noted(found: Replicated) -> Graph:
    """The graph, with what was split and what was not among its notes."""
    notes = [
        Note(by=NAME, operator=operator, node=piece, text=text, count=count)
        for piece, operator, count in found.collectives
        for sizes in [found.parts[piece].sizes]
        for text in [f"split in {len(sizes)} along the {found.axis} ({found.parts[piece]})"]
        if len(sizes) > 1
    ]
    notes += [
        Note(by=NAME, operator=each.operator, node=each.node, text=text, is_refusal=True)
        for each in found.refusals
        for text in [f"{each.reason} ({each.source})" if each.source else each.reason]
    ]
    certificates = {name: str(each) for name, each in found.certificates.items()}
    return replace(
        found.graph, notes=(*found.graph.notes, *gathered(notes)), certificates=certificates
    )


def _tried(number: int, duration_s: float) -> Note:
    text = f"{number} would take {duration_s * 1e3:.3f} ms"
    return Note(by=NAME, operator="graph", node="root", text=text)
