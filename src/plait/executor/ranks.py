"""What a schedule of several ranks needs of this process: its groups, and its shards."""

# pyright: basic
# (DeviceMesh and groups are not typed.)

from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from plait.compiler.shard import shard_shape
from plait.errors import PlanError
from plait.executor.codegen import GroupAtRun, Runner
from plait.graph.graph import Role
from plait.graph.schedule import Schedule

_REPLICATED_ON = "plait_replicated_on"
"""What a shard remembers of the parameter that it is of."""


def shard_parameters(model: nn.Module, mesh: DeviceMesh) -> None:
    """Keep of each parameter this rank's chunk of dim 0 on the axis "fsdp", filled up with zeros.

    Of one that is spread over "tp", a DTensor, it is a chunk of this rank's part. The model cannot
    run eagerly any more. Tied parameters stay tied. Make the optimizer afterwards.
    """
    num_ranks, rank = mesh["fsdp"].size(), mesh["fsdp"].get_local_rank()
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if parameter not in made:
                    shard = _shard(local_part(parameter.detach()), num_ranks, rank)
                    made[parameter] = nn.Parameter(shard, parameter.requires_grad)
                    setattr(made[parameter], _REPLICATED_ON, replicated_on(parameter))
                module._parameters[name] = made[parameter]


def local_part(x: Tensor) -> Tensor:
    """What this rank holds of a tensor that may be spread over ranks."""
    return x.to_local() if isinstance(x, DTensor) else x


def replicated_on(parameter: Tensor) -> tuple[str, ...]:
    """Axes of its mesh along which all ranks hold the same of a parameter, or of its shard."""
    if not isinstance(parameter, DTensor):
        return getattr(parameter, _REPLICATED_ON, ())
    names = parameter.device_mesh.mesh_dim_names or ()
    pairs = zip(names, parameter.placements, strict=True)
    return tuple(name for name, placement in pairs if isinstance(placement, Replicate))


@torch.no_grad()
def whole_parameters(
    schedule: Schedule, model: nn.Module, unshard: Runner | None
) -> dict[str, Tensor]:
    """Gather the parameters, or view them where each rank has them all, by name.

    Their `.grad` is apart from the model's. Raises PlanError if the model was not parted.
    """
    held = dict(model.named_parameters())
    values = [value for value in schedule.inputs if value.role is Role.PARAMETER]
    if unshard is None:
        return {value.name: held[value.name].detach() for value in values if value.name in held}
    steps = schedule.programs["unshard"].steps
    gathers = [step for step in steps if "all_gather" in step.target]
    num_ranks = int(str(gathers[0].args[1])) if gathers else 1
    shards = []
    for value in values:
        shard = held.get(value.name)
        found = None if shard is None else tuple(shard.shape)
        if shard is None or found != shard_shape(value.shape, num_ranks):
            raise PlanError(
                f"parameter {value.name} is {found} here, and a shard of {value.shape} for "
                f"{num_ranks} ranks is needed. Part the "
                "model with executor.ranks.shard_parameters(model, mesh)."
            )
        shards.append(shard.detach())
    return dict(zip((value.name for value in values), unshard(shards), strict=True))


@torch.no_grad()
def reduce_gradients(
    schedule: Schedule, model: nn.Module, whole: dict[str, Tensor], reduce: Runner
) -> None:
    """Average the gradients of the whole parameters, and add them to those of the model."""
    held = dict(model.named_parameters())
    names = [v.name for v in schedule.outputs if v.role is Role.GRADIENT and v.name in whole]
    gradients: list[Tensor | None] = [whole[name].grad for name in names]
    for x in whole.values():
        x.grad = None
    for name, gradient in zip(names, reduce(gradients), strict=True):
        known = held[name].grad
        held[name].grad = gradient if known is None else known + gradient


def _shard(x: Tensor, num_ranks: int, rank: int) -> Tensor:
    shard = x.new_zeros(shard_shape(x.shape, num_ranks))
    part = x[rank * len(shard) : (rank + 1) * len(shard)]
    shard[: part.shape[0]] = part
    return shard


def groups_of(
    schedule: Schedule, model: nn.Module, mesh: DeviceMesh | None = None
) -> dict[str, GroupAtRun]:
    """Find the process groups of the axes that the schedule names.

    They come from the mesh, or from those on which the model's parameters lie; else a group that is
    registered under the name of an axis is used. Raises PlanError if an axis has another size than
    the schedule was made for, or none.
    """
    meshes = [] if mesh is None else [mesh]
    meshes += [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
    found: dict[str, GroupAtRun] = {}
    for name, size in schedule.groups.items():
        known = next((m for m in meshes if name in (m.mesh_dim_names or ())), None)
        if known is None and (group := _registered(name)) is not None:
            found[name] = GroupAtRun(name, group.rank())
            continue
        if known is None or known[name].size() != size:
            names = () if mesh is None else mesh.mesh_dim_names or ()
            sizes = {} if mesh is None else {each: mesh[each].size() for each in names}
            raise PlanError(
                f"the schedule was made for {size} ranks on the axis {name!r}, and the mesh has "
                f"{sizes or 'no named axes'}. Give plait.run a mesh with it, as in "
                f"init_device_mesh(device, ({size},), mesh_dim_names=({name!r},))."
            )
        found[name] = GroupAtRun(known.get_group(name).group_name, known.get_local_rank(name))
    return found


def _registered(name: Any) -> Any:
    try:
        return _resolve_process_group(name)
    except (RuntimeError, ValueError):  # c10d has no question, only this error
        return None
