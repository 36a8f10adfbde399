"""Data parallel programs: `unshard` gathers parameters, `reduce_gradients` averages gradients.

All parameters of a dtype travel in one collective. Groups of ranks are named by their axis
and size in the steps ("axis:fsdp:2") and found when the schedule runs. A shard is a chunk of dim 0,
all of one size: the last are filled up with zeros, as FSDP2 does.
"""

# pyright: basic
# (fx nodes are not typed.)

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from plait.compiler.lower import Lowering
from plait.errors import PlanError
from plait.graph.graph import Node, Role, Value, module_of
from plait.graph.schedule import Schedule
from plait.plan.parallel_plan import ParallelPlan

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional


def add_data_parallel(schedule: Schedule, plan: ParallelPlan, lowering: Lowering) -> None:
    """Add the programs that a step of this plan needs, if any.

    unshard: from the shards of the parameters, in the order of `schedule.inputs`, to the parameters
    (only with fsdp). reduce_gradients: from their gradients, in the order of `schedule.outputs`, to
    the shards of the average over fsdp and dp; without fsdp, to the whole average.

    Raises PlanError for a parameter without dims, which cannot be sharded.
    """
    if not schedule.is_step or plan.fsdp * plan.dp == 1:
        return
    sizes = {"fsdp": plan.fsdp, "dp": plan.dp}
    schedule.groups |= {axis: size for axis, size in sizes.items() if size > 1}
    parameters = [value for value in schedule.inputs if value.role is Role.PARAMETER]
    names = {value.name for value in parameters}
    gradients = [v for v in schedule.outputs if v.role is Role.GRADIENT and v.name in names]
    for value in parameters:
        if plan.fsdp > 1 and not value.shape:
            raise PlanError(f"parameter {value.name} has no dims: fsdp={plan.fsdp} cannot part it.")
    modules = {"reduce_gradients": _reduce(gradients, plan)}
    if plan.fsdp > 1:
        modules = {"unshard": _unshard(parameters, plan.fsdp), **modules}
    for name, graph in modules.items():
        module = module_of(torch.nn.Module(), graph)
        schedule.programs[name] = lowering.program(name, module)


def shard_shape(shape: Sequence[int], num_ranks: int) -> tuple[int, ...]:
    """Shape of each rank's chunk of dim 0, filled up."""
    return (-(-shape[0] // num_ranks), *shape[1:])


class _Writer:
    def __init__(self, values: Sequence[Value]) -> None:
        self.graph = fx.Graph()
        names = [re.sub(r"\W", "_", f"{value.role.value}_{value.name}") for value in values]
        self.nodes = [self.graph.placeholder(name) for name in names]

    def __call__(self, target: Any, *args: Any) -> Node:
        return self.graph.call_function(target, args)

    def waited(self, target: Any, *args: Any) -> Node:
        return self(_c10d.wait_tensor.default, self(target, *args))


def _buckets(values: Sequence[Value]) -> list[list[int]]:
    found: dict[object, list[int]] = {}
    for i, value in enumerate(values):
        found.setdefault((value.dtype, value.device), []).append(i)
    return list(found.values())


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _unshard(values: Sequence[Value], num_ranks: int) -> fx.Graph:
    write = _Writer(values)
    results: dict[int, Node] = {}
    for bucket in _buckets(values):
        flat = [write(_aten.reshape.default, write.nodes[i], [-1]) for i in bucket]
        line = write(_aten.cat.default, flat)
        gather = _c10d.all_gather_into_tensor.default
        line = write.waited(gather, line, num_ranks, "fsdp")
        table = write(_aten.view.default, line, [num_ranks, -1])
        start = 0
        for i in bucket:
            shape = shard_shape(values[i].shape, num_ranks)
            part = write(_aten.slice.Tensor, table, 1, start, start + _numel(shape))
            whole = write(_aten.reshape.default, part, [num_ranks * shape[0], *shape[1:]])
            results[i] = write(_aten.slice.Tensor, whole, 0, 0, values[i].shape[0])
            start += _numel(shape)
    write.graph.output(tuple(results[i] for i in range(len(values))))
    return write.graph


def _reduce(values: Sequence[Value], plan: ParallelPlan) -> fx.Graph:
    write = _Writer(values)
    results: dict[int, Node] = {}
    for bucket in _buckets(values):
        table = [_rows(write, write.nodes[i], values[i], plan.fsdp) for i in bucket]
        line = write(_aten.cat.default, table, 1)
        if plan.fsdp > 1:
            scatter = _c10d.reduce_scatter_tensor.default
            line = write.waited(scatter, line, "sum", plan.fsdp, "fsdp")
        if plan.dp > 1:
            line = write.waited(_c10d.all_reduce.default, line, "sum", "dp")
        line = write(_aten.div.Scalar, write(_aten.view.default, line, [-1]), plan.fsdp * plan.dp)
        start = 0
        for i in bucket:
            shape = values[i].shape
            shape = shard_shape(shape, plan.fsdp) if plan.fsdp > 1 else shape
            part = write(_aten.slice.Tensor, line, 0, start, start + _numel(shape))
            results[i] = write(_aten.view.default, part, list(shape))
            start += _numel(shape)
    write.graph.output(tuple(results[i] for i in range(len(values))))
    return write.graph


def _rows(write: _Writer, gradient: Node, value: Value, num_ranks: int) -> Node:
    """The gradient as (ranks, elements of a shard)."""
    if num_ranks > 1:
        missing = shard_shape(value.shape, num_ranks)[0] * num_ranks - value.shape[0]
        if missing:
            padding = [0, 0] * (len(value.shape) - 1) + [0, missing]
            gradient = write(_aten.constant_pad_nd.default, gradient, padding)
    return write(_aten.reshape.default, gradient, [num_ranks, -1])
