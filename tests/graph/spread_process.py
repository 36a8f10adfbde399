"""One rank of a spread model: eager and compiled against the same model unspread.

Run as: python -m tests.graph.spread_process RANK WORLD STORE_FILE MODEL,... ; ends with status 0 if
all is equal within the tolerances of test_parallelize.
"""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from plait.graph.parallelize import parallelize, whole_parameter
from plait.graph.plan_mesh import plan_mesh
from plait.plan.parallel_plan import ParallelPlan
from tests.graph.spread_models import MODELS, loss, tokens
from tests.graph.test_parallelize import LOSS_TOLERANCE, TOLERANCE, distance, reference


def check(name: str, plan: ParallelPlan) -> None:
    expected, expected_gradients = reference(MODELS[name])
    with plan_mesh(plan) as mesh:
        model = parallelize(MODELS[name](), plan, mesh)
    steps = {"eager": loss, "compiled": torch.compile(loss, backend="aot_eager", fullgraph=True)}
    for kind, step in steps.items():
        model.zero_grad()
        value = step(model, tokens())
        value.backward()
        found = {n: whole_parameter(model, n, p.grad) for n, p in model.named_parameters()}
        torch.testing.assert_close(value.detach(), expected, rtol=LOSS_TOLERANCE, atol=0)
        worst = distance(found, expected_gradients)
        assert worst < TOLERANCE, f"{name}, {kind}: {worst}"


def main(rank: int, world: int, store_file: str, names: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(store_file, world)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        for name in names.split(","):
            check(name, ParallelPlan(tp=world, sp=True))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
