"""One rank of a gloo group with delayed completion: python gloo_ranks.py RANK SIZE STORE.

Prints, as JSON, what each collective gave and how long the slowest took.
"""

import json
import sys

import torch
import torch.distributed as dist

from plait.cost.clusters import Link
from plait.executor.delayed_process_group import DelayedProcessGroup, registered

LATENCY_S = 0.05


def main(rank: int, size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    link = Link(latency_s=LATENCY_S, bandwidth_bytes_per_s=1e9)
    group = DelayedProcessGroup(rank, size, link, inner=dist.group.WORLD)
    operators = torch.ops._c10d_functional
    x = torch.arange(4.0) + 10 * rank
    with registered({"tp": group}):
        results = [
            operators.all_reduce(x, "sum", "tp"),
            operators.all_gather_into_tensor(x, size, "tp"),
            operators.reduce_scatter_tensor(x, "sum", size, "tp"),
            operators.all_to_all_single(x, [2, 2], [2, 2], "tp"),
        ]
        values = [operators.wait_tensor(each).tolist() for each in results]
    first, last = group.transfers[0], group.transfers[-1]
    sys.stdout.write(json.dumps([values, last.waits[-1][1] - first.issue_s]))
    dist.destroy_process_group()


main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
