"""A process group whose collectives take a stated time, so that overlap is real on one machine.

One process stands for one rank of many. A graph whose collectives name a group runs unchanged
inside `delayed_groups`, or with the backend "delayed" (`register_delayed_backend`).

What is real: the launch; the clock; that the host goes on computing while a collective is under
way, and stops in `wait_tensor` until it is done, asleep, using no core; that collectives of one
group run one after another, in the order of their launches, and those of two groups side by side.

What is modelled: the time of a collective, from launch or from the end of the one before it in its
group, is `collective_s` of its bytes over the group's link, times `scale`; with scale 0 it is done
at once (the twin with free communication). It takes no core, no memory bandwidth and no cache from
the computation, which real communication does. All ranks are taken to launch at the same moment.

What is not there: the other ranks. Outputs have the right shape and, unless the group wraps a real
one (`inner`), hold this rank's data where the others' would be: all_reduce keeps the tensor,
all_gather repeats the shard, reduce_scatter takes this rank's part, all_to_all keeps rows in place.
They are written when the host waits, so a program that reads them before, or overwrites an operand
too early, computes something else. That copy is the host's time, in all variants alike.
With `inner` (gloo, say) data are the true ones and a collective takes the longer of its two times.
"""

# pyright: basic, reportAssignmentType=false, reportArgumentType=false, reportCallIssue=false
# (c10d types its own names for operands, which differ between releases, and of groups.)

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    _register_process_group,
    _resolve_process_group,
    _unregister_process_group,
)

from plait.cost.clusters import Link
from plait.cost.collectives import Collective, collective_s, sent_bytes
from plait.cost.timeline import Event, Stream
from plait.errors import PlanError

BACKEND = "delayed"


@dataclass(kw_only=True)
class Transfer:
    """One collective. Times are those of time.perf_counter.

    issue_s: when it was launched. start_s to end_s: when the link was its own. waits: when the host
    stood still for it, from and to.
    """

    collective: Collective
    sent_bytes: float
    issue_s: float
    start_s: float
    end_s: float
    waits: list[tuple[float, float]] = field(default_factory=list)


class DelayedProcessGroup(dist.ProcessGroup):
    """One rank's end of a group over a link. scale and link may be changed between collectives.

    transfers: what has been launched, in order; the caller may clear it.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        link: Link,
        *,
        scale: float = 1.0,
        inner: dist.ProcessGroup | None = None,
    ) -> None:
        if not 0 <= rank < size:
            raise PlanError(f"a group of {size} ranks has no rank {rank}.")
        if inner is not None and (inner.rank(), inner.size()) != (rank, size):
            raise PlanError(
                f"rank {rank} of {size} cannot wrap rank {inner.rank()} of {inner.size()}."
            )
        super().__init__(rank, size)
        self.link, self.scale, self.inner = link, scale, inner
        self.transfers: list[Transfer] = []
        self.free_s = 0.0  # when the last one launched ends
        self.names = {"name": "", "desc": ""}

    def getBackendName(self) -> str:
        """Name the backend, for c10d."""
        return BACKEND

    # c10d keeps a group's names in its backend, which a group written in Python does not have.
    def _set_group_name(self, name: str) -> None:
        self.names["name"] = name

    def _set_group_desc(self, desc: str) -> None:
        self.names["desc"] = desc

    @property
    def group_name(self) -> str:
        """The name by which collectives find it."""
        return self.names["name"]

    @property
    def group_desc(self) -> str:
        """What it is for."""
        return self.names["desc"]

    def allreduce(self, tensors: Sequence[Tensor], opts: object = None) -> dist.Work:
        """Keep the data."""
        return self._launch(Collective.ALL_REDUCE, "allreduce", (tensors, opts), tensors)

    def allreduce_coalesced(self, tensors: Sequence[Tensor], opts: object = None) -> dist.Work:
        """Keep the data; one message."""
        return self._launch(Collective.ALL_REDUCE, "allreduce_coalesced", (tensors, opts), tensors)

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: object = None
    ) -> dist.Work:
        """Fill every output with its shard, as often as there are ranks; one message."""

        def arrive() -> None:
            for output, shard in zip(outputs, inputs, strict=True):
                output.view(self.size(), -1).copy_(shard.reshape(1, -1))

        given = (outputs, inputs, opts)
        return self._launch(
            Collective.ALL_GATHER, "allgather_into_tensor_coalesced", given, outputs, arrive
        )

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: object = None
    ) -> dist.Work:
        """Take this rank's part of every input; one message."""

        def arrive() -> None:
            for output, whole in zip(outputs, inputs, strict=True):
                output.view(-1).copy_(whole.reshape(self.size(), -1)[self.rank()])

        given = (outputs, inputs, opts)
        return self._launch(
            Collective.REDUCE_SCATTER, "reduce_scatter_tensor_coalesced", given, inputs, arrive
        )

    def all_to_all_single(
        self,
        output: Tensor,
        whole: Tensor,
        output_sizes: Sequence[int] = (),
        input_sizes: Sequence[int] = (),
        opts: object = None,
    ) -> dist.Work:
        """Keep rows where they are; what is left of a longer output is zero."""

        def arrive() -> None:
            num_rows = min(len(output), len(whole))
            output[:num_rows].copy_(whole[:num_rows])
            output[num_rows:].zero_()

        given = (output, whole, output_sizes, input_sizes, opts)
        return self._launch(Collective.ALL_TO_ALL, "alltoall_base", given, [whole], arrive)

    def all_gather_single(self, output: Tensor, shard: Tensor, opts: object = None) -> dist.Work:
        """Fill the output with the shard, as often as there are ranks."""
        return self.all_gather_single_coalesced([output], [shard], opts)

    def reduce_scatter_single(
        self, output: Tensor, whole: Tensor, opts: object = None
    ) -> dist.Work:
        """Take this rank's part."""
        return self.reduce_scatter_single_coalesced([output], [whole], opts)

    # Names up to torch 2.12.
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single

    def _launch(
        self,
        collective: Collective,
        name: str,
        given: tuple[object, ...],
        larger: Sequence[Tensor],
        arrive: Callable[[], None] | None = None,
    ) -> dist.Work:
        """Put a collective in the queue. larger: its larger side. arrive: writes its outputs."""
        issue_s = time.perf_counter()
        num_bytes = sum(x.numel() * x.element_size() for x in larger)
        duration_s = self.scale * collective_s(collective, num_bytes, self.size(), self.link)
        start_s = max(issue_s, self.free_s) if duration_s else issue_s
        transfer = Transfer(
            collective=collective,
            sent_bytes=sent_bytes(collective, num_bytes, self.size()),
            issue_s=issue_s,
            start_s=start_s,
            end_s=start_s + duration_s,
        )
        self.free_s = max(self.free_s, transfer.end_s)
        self.transfers.append(transfer)
        if self.inner is None:
            return _DelayedWork(transfer, None, arrive)
        options = [x for x in given if x is not None]
        return _DelayedWork(transfer, getattr(self.inner, name)(*options), None)


class _DelayedWork(dist.Work):
    """A collective under way. The first to wait sleeps until it is due, then writes its outputs."""

    def __init__(
        self, transfer: Transfer, inner: dist.Work | None, arrive: Callable[[], None] | None
    ) -> None:
        super().__init__()
        self.transfer, self.inner, self.arrive = transfer, inner, arrive

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Sleep until it is done. timeout: of the wrapped group's work."""
        began_s = time.perf_counter()
        if self.inner is not None:
            self.inner.wait(*([timeout] if timeout else []))
        while (left_s := self.transfer.end_s - time.perf_counter()) > 0:
            time.sleep(left_s)
        self.transfer.waits.append((began_s, time.perf_counter()))
        if self.arrive is not None:
            with torch.no_grad():
                self.arrive()
            self.arrive = None
        return True

    def is_completed(self) -> bool:
        """Whether waiting would cost no time."""
        is_due = time.perf_counter() >= self.transfer.end_s
        return is_due and (self.inner is None or self.inner.is_completed())


@contextmanager
def delayed_groups(
    sizes: Mapping[str, int], link: Link, *, scale: float = 1.0
) -> Iterator[dict[str, DelayedProcessGroup]]:
    """Let graphs whose collectives name these groups run here, as rank 0 of so many ranks.

    sizes: ranks of each group, by the name that the graph uses. A group of that name that c10d
    already knows steps aside, and is back afterwards.
    """
    groups = {name: DelayedProcessGroup(0, size, link, scale=scale) for name, size in sizes.items()}
    with registered(groups):
        yield groups


@contextmanager
def registered(groups: Mapping[str, dist.ProcessGroup]) -> Iterator[None]:
    """Give collectives these groups by these names; what had the names is back afterwards."""
    known = {name: _known_group(name) for name in groups}
    try:
        for name, group in groups.items():
            _rename(name, group)
        yield
    finally:
        for name, group in known.items():
            _rename(name, group)


def _known_group(name: str) -> dist.ProcessGroup | None:
    try:
        return _resolve_process_group(name)
    except RuntimeError:  # c10d has no question, only this error
        return None


def _rename(name: str, group: dist.ProcessGroup | None) -> None:
    if _known_group(name) is not None:
        _unregister_process_group(name)
    if group is not None:
        _register_process_group(name, group)
        if isinstance(group, DelayedProcessGroup):
            group._set_group_name(name)


def register_delayed_backend(link: Link) -> None:
    """Make `init_process_group("delayed", ...)` and meshes use delayed groups over this link.

    One process is rank 0 of as many ranks as are asked for; give it a `HashStore`.
    """

    def create(store: object, rank: int, size: int, timeout: object) -> DelayedProcessGroup:
        return DelayedProcessGroup(rank, size, link)

    dist.Backend.register_backend(BACKEND, create, devices=["cpu"])


def communication_events(
    transfers: Sequence[Transfer], *, started_s: float, program: str = ""
) -> list[Event]:
    """Transfers as events of a timeline that started then: when the link was busy."""
    return [
        Event(
            name=f"{each.collective}_{i}",
            operator=str(each.collective),
            program=program,
            start_s=each.start_s - started_s,
            duration_s=each.end_s - each.start_s,
            stream=Stream.COMMUNICATION,
            bytes_read=round(each.sent_bytes),
            bytes_written=round(each.sent_bytes),
        )
        for i, each in enumerate(transfers)
    ]
