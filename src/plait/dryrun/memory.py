"""The ledger of a run's memory: how much at most, when, and what for.

Two figures: what lives at the peak (without fragments), and what PyTorch's allocator would reserve
on a GPU to serve the same requests (with fragments, `allocator.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from plait.cost.clusters import Cluster
from plait.dryrun.allocator import Reserved, with_fragments
from plait.dryrun.memory_trace import Kind, MemoryTrace

_MIB, _GIB = 2**20, 2**30
_NUM_LARGEST = 10
CONTEXT_BYTES = 568 * _MIB
"""Of a CUDA context with its kernels; it is not PyTorch's (assumed; 400 to 600 MiB are usual)."""
COMMUNICATOR_BYTES = 256 * _MIB
"""Of each process group: NCCL keeps 4 MiB a channel and direction for each peer of rings and trees
[NCCL_BUFFSIZE, docs.nvidia.com/deeplearning/nccl]; 16 channels of a ring and a tree (assumed)."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Memory that lives at the peak. name: of the value or parameter; source: the user's line."""

    name: str
    num_bytes: int
    kind: Kind
    operator: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Memory of one rank over a step.

    peak_bytes: live at once, at most; by_kind parts it. outside_bytes: beside PyTorch's allocator
    (context, communicators), not part of the peak. moment: number of the
    launch at which the peak is; where: that launch in words. largest: what lives there, the largest
    first. reserved: with fragments; expandable: the same with segments that grow.
    """

    peak_bytes: int
    by_kind: Mapping[Kind, int]
    moment: int
    where: str = ""
    source: str = ""
    largest: tuple[Tensor, ...] = ()
    reserved: Reserved | None = None
    expandable: Reserved | None = None
    outside_bytes: Mapping[str, int] = field(default_factory=dict[str, int])

    @property
    def total_bytes(self) -> int:
        """What the device must have: reserved where that is known, and what lies outside."""
        inside = self.peak_bytes if self.reserved is None else self.reserved.peak_bytes
        return inside + sum(self.outside_bytes.values())

    def missing(self, limit_bytes: int) -> str:
        """What is lacking of a limit, and what takes the memory, the largest first."""
        inside = {kind.value: count for kind, count in self.by_kind.items()}
        every = sorted((inside | dict(self.outside_bytes)).items(), key=lambda each: -each[1])
        parts = ", ".join(f"{name} {count / _GIB:.2f}" for name, count in every if count)
        return (
            f"{(self.total_bytes - limit_bytes) / _GIB:.2f} GiB are missing: "
            f"{self.total_bytes / _GIB:.2f} GiB are needed ({parts})"
        )


@dataclass(frozen=True)
class Places:
    """Words for moments: of each launch, where it stands and the user's line."""

    where: Sequence[str]
    source: Sequence[str]


def ledger_of(
    trace: MemoryTrace,
    *,
    first: int = -1,
    last: int | None = None,
    places: Places | None = None,
    outside_bytes: Mapping[str, int] | None = None,
    fragments: bool = True,
) -> Ledger:
    """Find the peak among the moments from `first` to `last`, and what lives there.

    What was allocated before `first` and lives on counts. fragments: replay the allocator too.
    """
    peak_bytes, at, moment = -1, 0, first
    for i, (when, live) in enumerate(trace.curve()):
        if when >= first and (last is None or when <= last) and live > peak_bytes:
            peak_bytes, at, moment = live, i, when
    live = trace.live_at(at)
    by_kind: dict[Kind, int] = {}
    for number in live:
        storage = trace.storages[number]
        by_kind[storage.kind] = by_kind.get(storage.kind, 0) + storage.num_bytes
    known = places is not None and 0 <= moment < len(places.where)
    requests = list(_requests(trace, last)) if fragments else []
    return Ledger(
        peak_bytes=max(peak_bytes, 0),
        by_kind={kind: by_kind[kind] for kind in Kind if kind in by_kind},
        moment=moment,
        where=places.where[moment] if places is not None and known else "",
        source=places.source[moment] if places is not None and known else "",
        largest=_largest(trace, live),
        reserved=with_fragments(requests) if fragments else None,
        expandable=with_fragments(requests, expandable=True) if fragments else None,
        outside_bytes=outside_bytes or {},
    )


def outside_bytes(cluster: Cluster, num_groups: int) -> dict[str, int]:
    """What a device holds beside the allocator's memory; nothing on a CPU."""
    if cluster.device.name == "cpu":
        return {}
    return {
        "device context": CONTEXT_BYTES,
        **({"communicators": num_groups * COMMUNICATOR_BYTES} if num_groups else {}),
    }


def _requests(trace: MemoryTrace, last: int | None) -> Iterator[tuple[int, int]]:
    for moment, number, is_allocated in trace.changes:
        if last is None or moment <= last:
            yield number, trace.storages[number].num_bytes if is_allocated else -1


def _largest(trace: MemoryTrace, live: Sequence[int]) -> tuple[Tensor, ...]:
    order = sorted(live, key=lambda number: -trace.storages[number].num_bytes)[:_NUM_LARGEST]
    return tuple(
        Tensor(
            name=storage.name,
            num_bytes=storage.num_bytes,
            kind=storage.kind,
            operator=storage.operator,
            source=storage.source,
        )
        for storage in (trace.storages[number] for number in order)
    )
