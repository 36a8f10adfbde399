"""Memory of one step kept for the next, on a CPU as on a GPU.

CUDA's allocator of PyTorch keeps what is freed. On a CPU the C library gives large blocks back to
the system, which hands out new pages at the next step and clears each of them when it is first
touched: some percent of a step, and more the more is alive at a time.
"""

import ctypes

# From malloc.h of the GNU C library; see mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory() -> bool:
    """From now on keep freed memory in this process; False where the C library has no such switch.

    For a process that does nothing but run steps: what it held at most, it holds to its end.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, _NEVER)) and bool(mallopt(_MMAP_MAX, 0))
