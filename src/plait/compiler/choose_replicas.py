"""How many replicas: what the plan says, or what the cost model finds best, one included."""

from dataclasses import replace

from plait.compiler.order import estimated_s, machine_of, order_pieces
from plait.compiler.replicate import Replicated, replicate
from plait.cost.clusters import Cluster
from plait.errors import PlanError
from plait.graph.graph import Graph
from plait.graph.note import Note, gathered
from plait.plan.parallel_plan import ParallelPlan

NAME = "replicas"
CANDIDATES = (2, 3, 4)


def choose_replicas(graph: Graph, plan: ParallelPlan, cluster: Cluster) -> Graph:
    """Split the graph in as many replicas as the plan says.

    "auto" tries each number on the cost model and keeps the best, which may be one; the notes say
    what each would take. Raises PlanError if an explicit number cannot be had.
    """
    if plan.replicas != "auto":
        assert isinstance(plan.replicas, int)
        return noted(replicate(graph, plan.replicas))
    machine = machine_of(graph, cluster)
    ordered, pieces = order_pieces(graph, machine)
    best, best_s = graph, estimated_s(ordered, pieces)
    tried = [_tried(1, best_s)]
    for number in CANDIDATES:
        try:
            found = noted(replicate(graph, number))
        except PlanError as error:
            tried.append(
                Note(by=NAME, operator="graph", node="root", text=str(error), is_refusal=True)
            )
            continue
        ordered, pieces = order_pieces(found, machine)
        duration_s = estimated_s(ordered, pieces)
        tried.append(_tried(number, duration_s))
        if duration_s < best_s:
            best, best_s = found, duration_s
    return replace(best, notes=(*best.notes, *tried))


def noted(found: Replicated) -> Graph:
    """The graph, with what was split and what was not among its notes."""
    notes = [
        Note(by=NAME, operator=operator, node=piece, text=text, count=count)
        for piece, operator, count in found.collectives
        for text in [f"split in {len(found.parts.sizes)} along the {found.axis}"]
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
