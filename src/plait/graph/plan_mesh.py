"""The mesh of a plan, with or without its devices."""

from collections.abc import Generator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

from plait.errors import PlanError
from plait.plan.parallel_plan import ParallelPlan


@contextmanager
def plan_mesh(
    plan: ParallelPlan, device_type: str = "cpu", *, rank: int = 0
) -> Generator[DeviceMesh]:
    """Yield the mesh of a plan: its axes above 1, from "pp" to "tp", and always "tp".

    In a process without a process group, the mesh is that of `rank` of as many ranks as the plan
    has, whose collectives move nothing, and nothing of it is left afterwards. Raises PlanError if
    there is a process group of another size.
    """
    sizes = {"pp": plan.pp, "dp": plan.dp, "fsdp": plan.fsdp, "cp": plan.cp, "tp": plan.tp}
    axes = {name: size for name, size in sizes.items() if size > 1 or name == "tp"}
    if dist.is_initialized():
        if dist.get_world_size() != plan.num_ranks:
            shape = ", ".join(f"{name}={size}" for name, size in axes.items())
            raise PlanError(
                f"the plan has {plan.num_ranks} ranks ({shape}), and {dist.get_world_size()} "
                "processes are running. Make them equal."
            )
        yield init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
        return
    dist.init_process_group("fake", rank=rank, world_size=plan.num_ranks, store=FakeStore())
    try:
        yield init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    finally:
        dist.destroy_process_group()
