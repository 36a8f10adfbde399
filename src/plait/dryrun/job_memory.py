"""Memory of one rank of a large job, by kind: a closed form for pruning, and a ledger from pieces.

Both leave out what the allocator wastes between blocks; `job_fragments.py` models that.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plait.cost.clusters import Device
from plait.dryrun.data_parallel import owners_of
from plait.dryrun.memory import COMMUNICATOR_BYTES, CONTEXT_BYTES
from plait.dryrun.piece import Piece
from plait.dryrun.pretrain_job import PretrainJob
from plait.plan.parallel_plan import ParallelPlan

_WEIGHT_BYTES = 2
_GATHERED_AHEAD = 2  # the layer that computes, and the next one
STATE_KINDS = ("parameters", "gradients", "optimizer state")
"""Kinds of a ledger that live from one step to the next."""


@dataclass(frozen=True)
class Ledger:
    """Bytes by kind."""

    bytes_by_kind: dict[str, int]

    outside_bytes: int = 0
    """Of these, what lies beside PyTorch's allocator: context, libraries, communicators."""

    @property
    def total_bytes(self) -> int:
        """Of all kinds."""
        return sum(self.bytes_by_kind.values())

    @property
    def first_step_bytes(self) -> int:
        """Of the first step, at whose end the optimizer's state is made: no activation is alive."""
        state = {kind: self.bytes_by_kind[kind] for kind in STATE_KINDS}
        passes_bytes = self.total_bytes - state["optimizer state"]
        return max(passes_bytes, sum(state.values()) + self.outside_bytes)

    def largest(self) -> str:
        """The kind that takes most."""
        return max(self.bytes_by_kind, key=lambda kind: self.bytes_by_kind[kind])


def state_bytes(
    elements: float, expert_elements: float, job: PretrainJob, plan: ParallelPlan
) -> dict[str, int]:
    """Parameters, gradients and optimizer of a rank that works on so many elements.

    expert_elements: of all experts, before ep. Raises nothing: numbers were checked before.
    """
    owners = owners_of(plan)
    experts = expert_elements / plan.ep
    shared = elements / owners.shards + experts / owners.expert_shards
    held = shared if plan.reshard else elements + experts
    sizes = _WEIGHT_BYTES * held, job.gradient_bytes * held, job.optimizer_bytes * shared
    return {kind: round(size) for kind, size in zip(STATE_KINDS, sizes, strict=True)}


def ledger_of(
    pieces: Iterable[tuple[Piece, int]],
    job: PretrainJob,
    plan: ParallelPlan,
    *,
    device: Device,
    sequences: float,
    saved_bytes: float,
    boundary_bytes: float,
) -> Ledger:
    """The ledger of a rank with these pieces.

    saved_bytes: of all micro-batches in flight. boundary_bytes: what a stage sends on.
    """
    held = list(pieces)
    elements = sum(count * piece.num_elements for piece, count in held)
    experts = sum(count * piece.num_expert_elements for piece, count in held)
    peaks = [
        max(piece.forward_peak.at(sequences), piece.backward_peak.at(sequences))
        + piece.expert_peak.at(sequences) / plan.ep
        for piece, _ in held
    ]
    communication = 2 * 2 * boundary_bytes if plan.pp > 1 else 0.0  # in and out, forward and back
    if plan.reshard:
        sizes = sorted(gathered_bytes(piece, plan) for piece, count in held for _ in range(count))
        communication += sum(sizes[-_GATHERED_AHEAD:])
    context_bytes = CONTEXT_BYTES + device.blas_workspace_bytes
    groups = sum(size > 1 for size in (plan.dp, plan.fsdp, plan.cp, plan.tp, plan.pp, plan.ep))
    return Ledger(
        {
            **state_bytes(elements, experts, job, plan),
            "saved activations": round(saved_bytes),
            "temporaries": round(max(peaks, default=0.0)),
            "communication": round(communication) + groups * COMMUNICATOR_BYTES,
            "context": context_bytes,
        },
        outside_bytes=context_bytes + groups * COMMUNICATOR_BYTES,
    )


def least_bytes(
    elements_by_stage: Sequence[tuple[float, float]],
    job: PretrainJob,
    plan: ParallelPlan,
    device: Device,
) -> int:
    """The least that the fullest rank needs, whatever its activations are.

    elements_by_stage: (elements, expert elements) that a rank holds, for each pipeline rank.
    """
    states = [sum(state_bytes(*each, job, plan).values()) for each in elements_by_stage]
    return max(states) + CONTEXT_BYTES + device.blas_workspace_bytes


def gathered_bytes(piece: Piece, plan: ParallelPlan) -> float:
    """Of a piece's parameters when the ranks that share them have gathered them."""
    return _WEIGHT_BYTES * (piece.num_elements + piece.num_expert_elements / plan.ep)
