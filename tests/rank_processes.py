"""Ranks as real processes, which exchange real data over gloo, on this machine only."""

import os

from tests.forked_process import ForkedProcess

_TIME_LIMIT_S = 500  # of which 40 are used on an idle machine


def run_ranks(count, module, *arguments):
    """Run `python -m module RANK ARGUMENTS...` for each rank; none may fail, or be left running."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        ForkedProcess("-m", module, rank, *arguments, env=environment) for rank in range(count)
    ]
    for done in [rank.finish(_TIME_LIMIT_S) for rank in ranks]:
        assert done.returncode == 0, done.stderr[-3000:]
