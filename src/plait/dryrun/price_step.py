"""`plait.price_step`: a price from a model and its inputs; capture, compile and price in one."""

# pyright: basic
# (Optimizers' groups are not typed.)

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plait.compiler.compile import compile
from plait.compiler.shard import shard_shape
from plait.cost.clusters import Cluster
from plait.dryrun.price import Price, price
from plait.errors import PlanError
from plait.graph.capture import capture
from plait.graph.graph import Graph, Role
from plait.plan.parallel_plan import ParallelPlan


def price_step(
    model: nn.Module,
    inputs: Sequence[object],
    plan: ParallelPlan,
    cluster: Cluster,
    *,
    loss: Callable[..., Tensor],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    level: str = "O0",
    **settings: Any,
) -> Price:
    """Capture a training step of any model, compile it, and price it on one rank of a cluster.

    The model (its own class, or Hugging Face's) may lie on the meta device: nothing of it is read
    but forms. inputs: of one rank, all its micro-batches together. loss: a function `loss(model,
    *inputs)` that returns a scalar. Experts are priced at balanced routing: each sees
    its share of all rows. optimizer: made of the whole model's parameters; each rank is
    priced with its part of them. settings: those of `price`.

    Raises as `capture`, `compile` and `price` do.
    """
    _check(plan, cluster)
    if isinstance(inputs, Tensor):
        raise PlanError("inputs is a tensor. Give a list of all that the loss takes: [tensor].")
    graph = capture(model, *inputs, plan=_placed(plan), loss=loss)
    given = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    parts = [_of_own_part(each, model, graph, plan) for each in given]
    schedule = compile(graph, plan, level=level, cluster=cluster, optimizer=parts or None)
    return price(schedule, cluster, **settings)


def _check(plan: ParallelPlan, cluster: Cluster) -> None:
    if plan.num_ranks > cluster.num_ranks:
        sizes = {each.name: getattr(plan, each.name) for each in fields(plan)}
        axes = ", ".join(
            f"{name}={sizes[name]}" for name in ("dp", "fsdp", "tp", "pp") if sizes[name] > 1
        )
        raise PlanError(
            f"the plan needs {plan.num_ranks} ranks ({axes}), and the cluster {cluster.name} has "
            f"{cluster.num_ranks}: {plan.num_ranks - cluster.num_ranks} are missing."
        )


def _placed(plan: ParallelPlan) -> ParallelPlan:
    """What `capture` places; fsdp and dp are programs around the step."""
    return replace(plan, dp=1, fsdp=1)


def _of_own_part(
    optimizer: Optimizer, model: nn.Module, graph: Graph, plan: ParallelPlan
) -> Optimizer:
    """The optimizer as one rank has it: of its part of each parameter, with names."""
    names = {id(p): name for name, p in model.named_parameters()}
    shapes = {value.name: value.shape for value in graph.inputs if value.role is Role.PARAMETER}
    made: dict[int, nn.Parameter] = {}

    def own(parameter: Tensor) -> nn.Parameter:
        if id(parameter) not in made:
            shape = shapes.get(names.get(id(parameter), ""), tuple(parameter.shape))
            shape = shard_shape(shape, plan.fsdp) if plan.fsdp > 1 and shape else shape
            local = torch.empty(shape, dtype=parameter.dtype, device="meta")
            made[id(parameter)] = nn.Parameter(local, parameter.requires_grad)
        return made[id(parameter)]

    own_part = object.__new__(type(optimizer))
    own_part.__dict__.update(optimizer.__dict__)
    own_part.state = defaultdict(dict)
    own_part.param_groups = []
    for group in optimizer.param_groups:
        missing = [p for p in group["params"] if id(p) not in names]
        if missing:
            raise PlanError(
                f"the optimizer updates a parameter of shape {tuple(missing[0].shape)} that is not "
                "one of the model. Make it of model.parameters()."
            )
        parameters = [own(p) for p in group["params"]]
        known = [names[id(p)] for p in group["params"]]
        own_part.param_groups.append({**group, "params": parameters, "param_names": known})
    return own_part
