"""A captured step in the forms that the meter of `plait overlap` compares.

Unsplit, split with every message waited for at once, split and ordered. Beside them what the cost
model says of each.
"""

from dataclasses import dataclass, replace

from plait.compiler.choose_replicas import best_split, noted
from plait.compiler.compile import compile
from plait.compiler.identities import drop_identities
from plait.compiler.merge import merge
from plait.compiler.order import Machine, Ordered, machine_of, order_pieces
from plait.compiler.separate import separate
from plait.compiler.spread_late import spread_late
from plait.cost.clusters import Cluster
from plait.cost.overlap import OverlapTimes
from plait.errors import GraphError, PlanError
from plait.graph.graph import BACKWARD, FORWARD, Graph, call_of
from plait.graph.schedule import Schedule
from plait.plan.parallel_plan import ParallelPlan

DIRECTIONS = {"forward": FORWARD, "backward": BACKWARD}
CANDIDATES = (1, 2, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Forms:
    """One number of replicas, of a graph as `prepared` returns it.

    axis: "token" or "batch". With one replica, split is unsplit. predicted: by direction. notes:
    sizes of the parts; what is not split, and why; what other numbers would take.
    """

    num_replicas: int
    axis: str
    split: Schedule
    overlapped: Schedule
    predicted: dict[str, OverlapTimes]
    notes: tuple[str, ...] = ()

    @property
    def predicted_s(self) -> float:
        """Time of the step, ordered."""
        return sum(each.overlapped_s for each in self.predicted.values())


def prepared(graph: Graph) -> Graph:
    """The graph on which all forms rest: what comes before replicas, at O0.

    Raises GraphError if nothing is communicated, or if it has no backward.
    """
    graph = merge(separate(spread_late(drop_identities(graph))))
    if not graph.groups:
        raise GraphError("nothing is communicated, so nothing can be hidden. Choose tp above 1.")
    if all(template.backward is None for template in graph.templates.values()):
        raise GraphError("the graph has no backward. Capture it with a loss.")
    return graph


def unordered(graph: Graph) -> Schedule:
    """Compile a graph as it is: each message is waited for where it is sent."""
    return compile(graph, ParallelPlan())


def forms_of(
    graph: Graph,
    num_replicas: int,
    cluster: Cluster,
    *,
    axis: str | None = None,
    causal_split: bool = False,
) -> Forms:
    """Split a prepared graph and order it. Raises PlanError if it cannot be split so."""
    machine = machine_of(graph, cluster)
    found_axis, notes, split = axis or "token", (), graph
    if num_replicas > 1:
        best = best_split(graph, num_replicas, machine, axis=axis, causal_split=causal_split)
        ordered, pieces = best.ordered
        split, found_axis = best.found.graph, best.found.axis
        refusals = [str(note) for note in noted(best.found).notes if note.is_refusal]
        (parts,) = set(best.found.parts.values())
        notes = (f"parts: {parts}", *refusals)
    else:
        ordered, pieces = order_pieces(graph, machine)
    return Forms(
        num_replicas=num_replicas,
        axis=found_axis,
        split=unordered(split),
        overlapped=unordered(ordered),
        predicted=_predicted(graph, split, pieces, machine, num_replicas),
        notes=notes,
    )


def best_forms(
    graph: Graph, cluster: Cluster, *, axis: str | None = None, causal_split: bool = False
) -> Forms:
    """The number of replicas that the cost model finds best; the smaller of equals."""
    tried: list[Forms] = []
    notes: list[str] = []
    for number in CANDIDATES:
        try:
            forms = forms_of(graph, number, cluster, axis=axis, causal_split=causal_split)
        except PlanError as error:
            if number == 1:
                raise
            notes.append(str(error))
            continue
        tried.append(forms)
        notes.append(f"replicas={number} would take {forms.predicted_s * 1e3:.4g} ms (predicted)")
    best = min(tried, key=lambda each: each.predicted_s)
    return replace(best, notes=(*notes, *best.notes))


def _predicted(
    graph: Graph, split: Graph, pieces: dict[str, Ordered], machine: Machine, num_replicas: int
) -> dict[str, OverlapTimes]:
    unsplit_pieces = order_pieces(graph, machine)[1]
    found: dict[str, OverlapTimes] = {}
    for direction, part in DIRECTIONS.items():
        before = _called(graph, unsplit_pieces, part)
        after = _called(split, pieces, part)
        free_s = sum(each.simulation.compute_s for each in before)
        split_free_s = sum(each.simulation.compute_s for each in after)
        found[direction] = OverlapTimes(
            num_replicas=num_replicas,
            unsplit_s=free_s + sum(each.simulation.communication_s for each in before),
            split_s=split_free_s + sum(each.simulation.communication_s for each in after),
            overlapped_s=sum(each.simulation.total_s for each in after),
            free_s=free_s,
            split_free_s=split_free_s,
        )
    return found


def _called(graph: Graph, pieces: dict[str, Ordered], part: str) -> list[Ordered]:
    calls = [call for call in map(call_of, graph.root.graph.nodes) if call is not None]
    return [pieces[f"{name}.{each}"] for name, each in calls if each == part]
