"""Ranks as real processes, which exchange real data over gloo, on this machine only."""

import os
import subprocess
import sys

_TIME_LIMIT_S = 500  # of which 40 are used on an idle machine


def run_ranks(count, module, *arguments):
    """Run `python -m module RANK ARGUMENTS...` for each rank; none may fail, or be left running."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, str(rank), *map(str, arguments)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        errors = [process.communicate(timeout=_TIME_LIMIT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, error in zip(processes, errors, strict=True):
        assert process.returncode == 0, error[-3000:]
