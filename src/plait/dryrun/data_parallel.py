"""What sharded parameters and copies of a model cost in time: gathers, scattered sums, sums.

Closed forms, not captured: with `reshard` each layer's parameters are gathered for each pass while
the layer before computes, and its gradients scattered while the next one does; without, they are
gathered once before the first micro-batch reaches them and scattered behind the last. Ranks of cp
see parts of the same sequences, so their gradients are summed as well, and they share parameters
with those of fsdp, as in PyTorch's FSDP2 with context parallelism.
"""

import math
from dataclasses import dataclass

from plait.cost.collectives import Collective
from plait.cost.topology import Placement
from plait.dryrun.piece import Piece
from plait.dryrun.piece_time import PieceClock, Sent
from plait.plan.parallel_plan import ParallelPlan

_WEIGHT_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """Times of one piece's parameters over the mesh, in seconds, and bytes when gathered.

    measured_s: of the three times, what nccl-tests measured.
    """

    gather_s: float
    scatter_s: float
    sum_s: float
    num_bytes: int
    measured_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All messages, one after the other."""
        return self.gather_s + self.scatter_s + self.sum_s


@dataclass(frozen=True, kw_only=True)
class Owners:
    """Over how many ranks a piece's parameters are shared, and over how many copied.

    expert_shards counts those that share one rank's experts, besides ep.
    """

    shards: int
    copies: int
    expert_shards: int
    expert_copies: int


def owners_of(plan: ParallelPlan) -> Owners:
    """Who owns what. Experts are shared over ep first, then over what is left of fsdp and cp.

    Under sp the ranks of tp see different tokens: those that ep leaves hold copies of experts.

    Without fsdp nothing but experts is shared, and ranks of cp hold copies.
    """
    shards = plan.fsdp * plan.cp if plan.fsdp > 1 else 1
    left = plan.num_expert_ranks // plan.ep
    expert_shards = math.gcd(left, shards)
    return Owners(
        shards=shards,
        copies=plan.dp * plan.fsdp * plan.cp // shards,
        expert_shards=expert_shards,
        expert_copies=left // expert_shards,
    )


def gathered(
    piece: Piece, plan: ParallelPlan, clock: PieceClock, *, gradient_bytes: int
) -> Gathered:
    """Price the messages of one piece's parameters and gradients."""
    experts = piece.num_expert_elements // plan.ep
    shard_at, copy_at, expert_at, expert_copy_at = placements(plan, clock)
    parts = (
        (piece.num_elements, shard_at, copy_at),
        (experts, expert_at, expert_copy_at),
    )
    gather_s = scatter_s = sum_s = measured_s = 0.0
    for elements, where, copies in parts:
        gradient = elements * gradient_bytes
        gather: Sent = (Collective.ALL_GATHER, _WEIGHT_BYTES * elements, where)
        scatter: Sent = (Collective.REDUCE_SCATTER, gradient, where)
        sums: Sent = (Collective.ALL_REDUCE, gradient / where.num_ranks, copies)
        gather_s += clock.message_s(*gather)
        scatter_s += clock.message_s(*scatter)
        sum_s += clock.message_s(*sums)
        measured_s += clock.measured_s((gather, scatter, sums))
    return Gathered(
        gather_s=gather_s,
        scatter_s=scatter_s,
        sum_s=sum_s,
        num_bytes=_WEIGHT_BYTES * (piece.num_elements + experts),
        measured_s=measured_s,
    )


def placements(plan: ParallelPlan, clock: PieceClock) -> tuple[Placement, ...]:
    """Where those lie that share parameters, their copies, and the same of experts."""
    owners = owners_of(plan)
    # Neighbours hold different experts; behind these lie their shards, then their copies.
    stride = plan.ep * (1 if plan.sp else plan.tp)
    return (
        clock.placement("fsdp", owners.shards, plan.tp),
        clock.placement("dp", owners.copies, plan.tp * owners.shards),
        clock.placement("fsdp", owners.expert_shards, stride),
        clock.placement("dp", owners.expert_copies, stride * owners.expert_shards),
    )
