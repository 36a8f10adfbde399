"""A process group whose collectives run on a side stream of this GPU: emulated, not sent.

One process stands for one rank of many, as in `delayed_process_group.py`. Here a collective is work
on the device: beside the computation, on a stream of its own, a kernel of so many blocks stays
resident for as long as `collective_s` says, and the message's bytes are copied within the memory.
So what overlap costs on a GPU, multiprocessors and memory bandwidth taken from the computation, is
there; the link and the other ranks are not. Figures of it are labelled "emulated".
"""

# pyright: basic
# (CUDA streams and kernels are not typed.)

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plait.cost.clusters import Link
from plait.cost.collectives import Collective, collective_s, sent_bytes
from plait.errors import PlanError
from plait.executor.delayed_process_group import DelayedProcessGroup, Transfer

_NS_PER_S = 1e9
_THREADS = 640  # of a block of NCCL's kernels (NCCL_MAX_NTHREADS in its src/include/device.h)
_STAY = """
extern "C" __global__ void stay(long long ns) {
    unsigned long long began, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(began));
    do { asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); } while (now - began < ns);
}
"""


class EmulatedProcessGroup(DelayedProcessGroup):
    """One rank's end of a group whose collectives occupy `num_blocks` multiprocessors.

    With num_blocks 0 a message takes its time on one thread, and its bytes are copied nonetheless.
    Raises PlanError where there is no CUDA device.
    """

    def __init__(
        self, rank: int, size: int, link: Link, *, num_blocks: int, scale: float = 1.0
    ) -> None:
        if not torch.cuda.is_available():
            raise PlanError(
                "emulated collectives run on a GPU, and there is none. Use DelayedProcessGroup, "
                "whose messages take time on the host."
            )
        available = torch.cuda.get_device_properties().multi_processor_count
        if not 0 <= num_blocks < available:
            raise PlanError(
                f"a message can occupy 0 to {available - 1} multiprocessors, got {num_blocks}."
            )
        super().__init__(rank, size, link, scale=scale)
        self.num_blocks = num_blocks
        self.stream: Any = torch.cuda.Stream(priority=-1)
        self.stay: Any = torch.cuda._compile_kernel(_STAY, "stay")
        self.scratch: dict[int, tuple[Tensor, Tensor]] = {}

    def _launch(
        self,
        collective: Collective,
        name: str,
        given: tuple[object, ...],
        larger: Sequence[Tensor],
        arrive: Callable[[], None] | None = None,
    ) -> dist.Work:
        num_bytes = sum(x.numel() * x.element_size() for x in larger)
        duration_s = self.scale * collective_s(collective, num_bytes, self.size(), self.link)
        moved = sent_bytes(collective, num_bytes, self.size())
        self.transfers.append(
            Transfer(collective=collective, sent_bytes=moved, issue_s=0.0, start_s=0.0, end_s=0.0)
        )
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            if duration_s:
                self._copy(round(moved))
                grid, block = (max(self.num_blocks, 1), 1, 1), (_THREADS, 1, 1)
                block = block if self.num_blocks else (1, 1, 1)
                self.stay(grid=grid, block=block, args=[round(duration_s * _NS_PER_S)])
            if arrive is not None:
                with torch.no_grad():
                    arrive()
            done = torch.cuda.Event()
            done.record(self.stream)
        return _EmulatedWork(done, (given, larger))

    def _copy(self, num_bytes: int) -> None:
        """Read and write as many bytes as the message has."""
        if num_bytes not in self.scratch:
            pair = [torch.empty(num_bytes, dtype=torch.uint8, device="cuda") for _ in range(2)]
            self.scratch[num_bytes] = (pair[0], pair[1])
        target, source = self.scratch[num_bytes]
        target.copy_(source, non_blocking=True)


class _EmulatedWork(dist.Work):
    """A collective on the side stream: who waits lets the current stream wait, not the host."""

    def __init__(self, done: Any, keeps: object) -> None:
        super().__init__()
        self.done, self.keeps = done, keeps  # operands must live until it has run

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Order the current stream behind it."""
        torch.cuda.current_stream().wait_event(self.done)
        return True

    def is_completed(self) -> bool:
        """Whether it has run."""
        return self.done.query()
