"""The CUDA caching allocator, as a model: what a run reserves of a device, fragments included.

PyTorch asks the device for segments, cuts them into blocks, and keeps what is freed for later. So a
run reserves more than it uses. The rules and constants are those of c10/cuda/CUDACachingAllocator.h
and .cpp (torch 2.13); the names in brackets are theirs.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

from plait.errors import PlanError

_MIB = 2**20
_BLOCK = 512  # [kMinBlockSize] sizes are multiples of it
_SMALL = _MIB  # [kSmallSize] up to here a request goes to the pool of small blocks
_SMALL_SEGMENT = 2 * _MIB  # [kSmallBuffer]
_LARGE_SEGMENT = 20 * _MIB  # [kLargeBuffer]
_OWN_SEGMENT = 10 * _MIB  # [kMinLargeAlloc] from here on a request gets a segment of its size
_ROUND_SEGMENT = 2 * _MIB  # [kRoundLarge]
_ADDRESS_BITS, _LARGE_POOL = 60, 2**56


@dataclass(frozen=True)
class Reserved:
    """peak_bytes: reserved of the device at most. used_bytes: in blocks at most, rounded up.

    fits is False where a limit was given and the run asked for more; needed_bytes is then what was
    reserved, with all that was free given back, when the first request failed, and the request.
    """

    peak_bytes: int
    used_bytes: int
    fits: bool = True
    needed_bytes: int = 0


class _Full(Exception):
    def __init__(self, needed_bytes: int) -> None:
        super().__init__()
        self.needed_bytes = needed_bytes


@dataclass(eq=False, slots=True)
class _Block:
    """Neighbours are those of the same segment, in order of address."""

    pool: "_Pool"
    address: int
    size: int
    is_free: bool = False
    before: "_Block | None" = None
    after: "_Block | None" = None


@dataclass(eq=False, slots=True)
class _Pool:
    """free: one number of each free block, its size before its address, in order."""

    is_small: bool
    free: list[int] = field(default_factory=list[int])
    at: dict[int, _Block] = field(default_factory=dict[int, _Block])
    last: _Block | None = None  # of the one segment that grows

    def add(self, block: _Block) -> None:
        block.is_free = True
        key = block.size << _ADDRESS_BITS | block.address
        self.at[key] = block
        insort(self.free, key)

    def remove(self, block: _Block) -> None:
        block.is_free = False
        del self.free[bisect_left(self.free, block.size << _ADDRESS_BITS | block.address)]

    def best_fit(self, size: int) -> _Block | None:
        """The smallest free block that is large enough, the lowest of those [get_free_block]."""
        i = bisect_left(self.free, size << _ADDRESS_BITS)
        return self.at[self.free[i]] if i < len(self.free) else None


class CachingAllocator:
    """Serves requests of one stream. `reserved_bytes` and `used_bytes` are the present figures.

    expandable: segments grow in place (PYTORCH_ALLOC_CONF=expandable_segments:True). limit_bytes:
    what the device has; None, it is never full.
    """

    def __init__(self, *, expandable: bool = False, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise PlanError(f"a device cannot have {limit_bytes} bytes.")
        self.expandable, self.limit_bytes = expandable, limit_bytes
        self.pools = {True: _Pool(is_small=True), False: _Pool(is_small=False)}
        self.blocks: dict[int, _Block] = {}
        self.reserved_bytes = self.used_bytes = self.next_address = 0
        self.peak_reserved_bytes = self.peak_used_bytes = 0

    def allocate(self, number: int, num_bytes: int) -> None:
        """Serve a request; the number names it. Nothing is allocated for no bytes."""
        if not num_bytes:
            return
        size = max(_BLOCK, _rounded(num_bytes, _BLOCK))  # [round_size]
        pool = self.pools[size <= _SMALL]
        block = pool.best_fit(size)
        if block is not None:
            pool.remove(block)
        else:
            block = self._extended(pool, size) if self.expandable else self._segment(pool, size)
        self._split(block, size)
        self.blocks[number] = block
        self.used_bytes += block.size
        self.peak_used_bytes = max(self.peak_used_bytes, self.used_bytes)

    def free(self, number: int) -> None:
        """Give a block back; free neighbours become one [free_block, try_merge_blocks]."""
        block = self.blocks.pop(number, None)
        if block is None:
            return
        self.used_bytes -= block.size
        pool = block.pool
        before, after = block.before, block.after
        if before is not None and before.is_free:
            pool.remove(before)
            before.size += block.size
            _join(before, after)
            block = before
        if after is not None and after.is_free:
            pool.remove(after)
            block.size += after.size
            _join(block, after.after)
        if block.after is None and self.expandable:
            pool.last = block
        pool.add(block)

    def _segment(self, pool: _Pool, size: int) -> _Block:
        """A new segment [get_allocation_size, alloc_block]."""
        if pool.is_small:
            segment = _SMALL_SEGMENT
        else:
            segment = _LARGE_SEGMENT if size < _OWN_SEGMENT else _rounded(size, _ROUND_SEGMENT)
        self._reserve(segment)
        block = _Block(pool, self.next_address, segment)
        self.next_address += segment
        return block

    def _extended(self, pool: _Pool, size: int) -> _Block:
        """The end of the pool's one segment, made longer [try_allocate_expandable_block]."""
        last = pool.last
        unit = _SMALL_SEGMENT if pool.is_small else _LARGE_SEGMENT
        known = last.size if last is not None and last.is_free else 0
        grown = _rounded(size - known, unit)
        self._reserve(grown)
        if last is not None and last.is_free:
            pool.remove(last)
            last.size += grown
            return last
        # Each pool has a range of addresses of its own, far longer than any device.
        start = 0 if pool.is_small else _LARGE_POOL
        address = start if last is None else last.address + last.size
        block = _Block(pool, address, grown, before=last)
        if last is not None:
            last.after = block
        pool.last = block
        return block

    def _split(self, block: _Block, size: int) -> None:
        """Cut off what is not needed, where it is worth it [should_split]."""
        rest = block.size - size
        least = _BLOCK if block.pool.is_small or self.expandable else _SMALL + 1
        if rest < least:
            return
        remaining = _Block(block.pool, block.address + size, rest, before=block, after=block.after)
        if block.after is not None:
            block.after.before = remaining
        block.after, block.size = remaining, size
        if block.pool.last is block:
            block.pool.last = remaining
        block.pool.add(remaining)

    def _reserve(self, num_bytes: int) -> None:
        if self.limit_bytes is not None and self.reserved_bytes + num_bytes > self.limit_bytes:
            self._give_back()
            if self.reserved_bytes + num_bytes > self.limit_bytes:
                raise _Full(self.reserved_bytes + num_bytes)
        self.reserved_bytes += num_bytes
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _give_back(self) -> None:
        """Return segments that are free as a whole to the device [release_cached_blocks]."""
        for pool in self.pools.values():
            for key in list(pool.free):
                block = pool.at[key]
                if block.before is None and block.after is None and not self.expandable:
                    pool.remove(block)
                    self.reserved_bytes -= block.size


def with_fragments(
    requests: Iterable[tuple[int, int]], *, expandable: bool = False, limit_bytes: int | None = None
) -> Reserved:
    """Replay allocations and frees in order: (number, bytes), and (number, -1) for a free."""
    allocator = CachingAllocator(expandable=expandable, limit_bytes=limit_bytes)
    try:
        for number, num_bytes in requests:
            if num_bytes < 0:
                allocator.free(number)
            else:
                allocator.allocate(number, num_bytes)
    except _Full as full:
        return Reserved(
            allocator.peak_reserved_bytes, allocator.peak_used_bytes, False, full.needed_bytes
        )
    return Reserved(allocator.peak_reserved_bytes, allocator.peak_used_bytes)


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _join(block: _Block, after: _Block | None) -> None:
    block.after = after
    if after is not None:
        after.before = block
