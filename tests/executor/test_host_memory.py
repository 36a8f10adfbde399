"""Freed memory that is kept for the next step."""

import subprocess
import sys

import pytest

_PROGRAM = """
import resource, sys
import torch
from plait.executor.host_memory import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()

def touched():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.ones(64 * 2**20, dtype=torch.uint8)
    del x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(touched() for _ in range(8)))
"""


def _faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the switch is the GNU C library's")
def test_pages_of_a_freed_tensor_are_used_again_without_a_fault():
    # At its fewest: small blocks taken in between may lie where the next one would have fitted.
    # 64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB.
    assert _faults("kept") == 0 < _faults("given back")
