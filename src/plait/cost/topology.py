"""How a mesh axis lies in a cluster, and by which algorithm its collectives are fastest.

`collectives.py` has the ring over one link. Here an axis knows how many of its ranks share a node:
its rings cross between nodes over as many adapters as it has ranks in a node, which is why an axis
of neighbours is faster than one of ranks far apart. Of several algorithms the fastest is taken, as
NCCL's tuning does [github.com/NVIDIA/nccl, src/graph/tuning.cc].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from plait.cost.clusters import Cluster, Link
from plait.cost.collectives import Collective, collective_s, sent_bytes
from plait.cost.nccl_tests import Measured, measured_s
from plait.errors import PlanError


class Algorithm(StrEnum):
    """How a collective is done, or where its time comes from."""

    RING = "ring"
    TREE = "tree"
    DIRECT = "direct"
    HIERARCHICAL = "hierarchical"
    MEASURED = "measured"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """An axis of num_ranks ranks, ranks_in_node of them in each node."""

    num_ranks: int
    ranks_in_node: int
    inside: Link
    between: Link

    @property
    def num_nodes(self) -> int:
        """Nodes that the axis spans."""
        return -(-self.num_ranks // self.ranks_in_node)


@dataclass(frozen=True)
class Message:
    """The time of a collective, and the algorithm that it is for."""

    duration_s: float
    algorithm: Algorithm


def place(cluster: Cluster, axis: str, *, size: int, stride: int = 1) -> Placement:
    """Say how an axis lies whose neighbours are `stride` ranks apart.

    An axis in `cluster.links` has that link between all its ranks.
    """
    if size < 1 or stride < 1:
        raise PlanError(f"an axis needs ranks, got size={size} and stride={stride} of {axis!r}.")
    if axis in cluster.links:
        link = cluster.links[axis]
        return Placement(num_ranks=size, ranks_in_node=size, inside=link, between=link)
    together = max(1, min(size, cluster.ranks_per_node // stride))
    return Placement(
        num_ranks=size, ranks_in_node=together, inside=cluster.inside, between=cluster.between
    )


def message(
    collective: Collective,
    num_bytes: float,
    placement: Placement,
    measured: Sequence[Measured] = (),
) -> Message:
    """The time of a collective over an axis by its fastest algorithm, or as it was measured.

    num_bytes: of the larger side on one rank, as in `collectives.py`. measured: runs of nccl-tests;
    one of the same collective and placement goes before any model.
    """
    if placement.num_ranks == 1 or num_bytes == 0:
        return Message(0.0, Algorithm.DIRECT)
    seen = measured_s(measured, collective, num_bytes, placement.num_ranks, placement.ranks_in_node)
    if seen is not None:
        return Message(seen, Algorithm.MEASURED)
    if collective is Collective.ALL_TO_ALL:
        return Message(_all_to_all_s(num_bytes, placement), Algorithm.DIRECT)
    times = {
        Algorithm.RING: collective_s(
            collective, num_bytes, placement.num_ranks, _ring_link(placement)
        ),
        Algorithm.DIRECT: _direct_s(collective, num_bytes, placement),
    }
    if collective is Collective.ALL_REDUCE:
        times[Algorithm.TREE] = _tree_s(num_bytes, placement)
    if 1 < placement.ranks_in_node < placement.num_ranks:
        times[Algorithm.HIERARCHICAL] = _hierarchical_s(collective, num_bytes, placement)
    best = min(times, key=lambda algorithm: times[algorithm])
    return Message(times[best], best)


def send_s(num_bytes: float, cluster: Cluster, *, stride: int) -> float:
    """Time to send to the rank `stride` further on."""
    link = cluster.inside if stride < cluster.ranks_per_node else cluster.between
    return link.latency_s + num_bytes / link.bandwidth_bytes_per_s


def _ring_link(placement: Placement) -> Link:
    """The slowest part of a ring: inside a node, or its crossings, one over each adapter."""
    inside, between = placement.inside, placement.between
    if placement.num_nodes == 1:
        return inside
    crossing = placement.ranks_in_node * between.bandwidth_bytes_per_s
    if placement.ranks_in_node > 1:
        crossing = min(crossing, inside.bandwidth_bytes_per_s)
    return Link(
        latency_s=between.latency_s,
        bandwidth_bytes_per_s=crossing,
        step_latency_s=between.step_latency_s,
    )


def _tree_s(num_bytes: float, placement: Placement) -> float:
    """A double binary tree over the nodes: everything goes up and down once [NCCL 2.4, 2019].

    https://developer.nvidia.com/blog/massively-scale-deep-learning-training-nccl-2-4
    """
    link = _ring_link(placement)
    depth = math.ceil(math.log2(max(2, placement.num_nodes)))
    inside = placement.ranks_in_node - 1
    steps = 2 * (depth * link.step_latency_s + inside * placement.inside.step_latency_s)
    return link.latency_s + steps + 2 * num_bytes / link.bandwidth_bytes_per_s


def _direct_s(collective: Collective, num_bytes: float, placement: Placement) -> float:
    """Everybody sends to everybody at once; of an all_reduce each sends the whole to all others."""
    sent = sent_bytes(Collective.ALL_GATHER, num_bytes, placement.num_ranks)
    if collective is Collective.ALL_REDUCE:
        sent = (placement.num_ranks - 1) * num_bytes
    share_outside = 1 - (placement.ranks_in_node - 1) / (placement.num_ranks - 1)
    outside_s = share_outside * sent / placement.between.bandwidth_bytes_per_s
    inside_s = (1 - share_outside) * sent / placement.inside.bandwidth_bytes_per_s
    return _latency_s(placement) + max(outside_s, inside_s)


def _all_to_all_s(num_bytes: float, placement: Placement) -> float:
    return _direct_s(Collective.ALL_TO_ALL, num_bytes, placement)


def _latency_s(placement: Placement) -> float:
    link = placement.inside if placement.num_nodes == 1 else placement.between
    return link.latency_s


def _hierarchical_s(collective: Collective, num_bytes: float, placement: Placement) -> float:
    """Inside each node, between nodes with a part each, and inside again."""
    g = placement.ranks_in_node
    part = num_bytes / g
    inside, between = placement.inside, placement.between
    across_s = collective_s(collective, part, placement.num_nodes, between)
    if collective is not Collective.ALL_REDUCE:
        return across_s + collective_s(collective, num_bytes, g, inside)
    scatter_s = collective_s(Collective.REDUCE_SCATTER, num_bytes, g, inside)
    return scatter_s + across_s + collective_s(Collective.ALL_GATHER, num_bytes, g, inside)
