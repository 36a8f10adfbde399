"""A frame of a model that is spread over ranks, compiled in replicas.

TorchDynamo hands in the model's DTensors. The graph takes what this rank holds of them, as
`plait.capture` does, is cut at attention instead of from block to block, and its tokens are split;
autograd brings the gradients back to the DTensors.
"""

# pyright: basic
# (TorchDynamo and DTensor are not typed.)

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from plait.compiler.compile import compile as compile_graph
from plait.errors import PlanError
from plait.executor.agree import check_agreement
from plait.executor.codegen import GroupAtRun
from plait.executor.run import Runnable, local_part
from plait.graph.capture import num_attentions
from plait.graph.compose import Names, compose
from plait.graph.distributed import localize, name_groups
from plait.graph.graph import Graph, Role, copied
from plait.graph.torch_release import is_of_module
from plait.graph.trace import NotATemplate
from plait.graph.uses import part_uses
from plait.plan.parallel_plan import ParallelPlan


@dataclass(frozen=True)
class SpreadGraph:
    """A captured frame of a spread model.

    numbers: of the frame's inputs that the graph takes; some twice (see `graph/uses.py`).
    """

    graph: Graph
    plan: ParallelPlan
    groups: dict[str, GroupAtRun]
    numbers: list[int]

    def compiled(self, level: str) -> "SpreadFrame":
        """In replicas. Raises PlanError if it cannot be had in as many as the plan says."""
        schedule = compile_graph(self.graph, self.plan, level=level)
        return SpreadFrame(Runnable(schedule, groups=self.groups), self.numbers)


class SpreadFrame:
    """Runs a schedule on what this rank holds of its inputs; asks the other ranks first."""

    def __init__(self, runnable: Runnable, numbers: list[int]) -> None:
        self.runnable, self.numbers = runnable, numbers
        self.has_agreed = False

    def __call__(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Run as torch.compile asks for."""
        schedule, held = self.runnable.schedule, [inputs[i] for i in self.numbers]
        if not self.has_agreed:
            named = zip(schedule.inputs, held, strict=False)
            weights = {value.name: x for value, x in named if value.role is Role.PARAMETER}
            check_agreement(schedule, weights, self.runnable.groups)
            self.has_agreed = True
        return self.runnable(*map(local_part, held))


# Where a graph breaks, Dynamo would read our own code.
SpreadFrame.__call__ = torch._dynamo.disable(SpreadFrame.__call__)  # type: ignore[method-assign]


def meshes_of(inputs: Iterable[object]) -> list[DeviceMesh]:
    """The meshes on which the inputs of a frame lie: none, if it is no part of a spread model."""
    meshes = [x.device_mesh for x in inputs if isinstance(x, DTensor)]
    return list(dict.fromkeys(meshes))


def capture_spread(
    module: fx.GraphModule, inputs: Sequence[object], replicas: int | str, fake_mode: FakeTensorMode
) -> SpreadGraph:
    """Capture one frame of a spread model; Dynamo's module stays as it is.

    Raises PlanError if the model does not lie on one named axis, or cannot be cut into pieces.
    """
    sources = _inputs(module)
    module = _own_copy(module)
    again = part_uses(module)
    # Fake ones: what is traced has no memory.
    examples = [
        node.meta["example_value"] if isinstance(x, DTensor) else x
        for node, x in zip(sources, inputs, strict=True)
    ]
    places = [*range(len(inputs)), *again]
    _, meshes = localize(module, [examples[i] for i in places])
    numbers = [i for i in places if not isinstance(inputs[i], DeviceMesh)]
    roles = [_role_of(sources[i], inputs[i]) for i in numbers]
    plan = ParallelPlan(tp=_named(meshes).size(), replicas=replicas)
    names: Names = {
        node: (role, node.name) for node, role in zip(_inputs(module), roles, strict=True)
    }
    given = [inputs[i] for i, role in zip(numbers, roles, strict=True) if role is Role.INPUT]
    try:
        graph = compose(module, fake_mode, names, num_attentions=num_attentions(plan, given))
    except NotATemplate as error:
        raise PlanError(
            f"replicas={replicas}: this part of the program cannot be cut into pieces: {error}. "
            "Use replicas=1."
        ) from error
    name_groups(graph, meshes)
    groups = {
        axis: GroupAtRun(each.get_group(axis).group_name, each.get_local_rank(axis))
        for each in meshes
        for axis in each.mesh_dim_names or ()
    }
    return SpreadGraph(graph, plan, groups, numbers)


def _is_parameter(x: object) -> bool:
    return isinstance(x, DTensor | nn.Parameter)


def _named(meshes: Sequence[DeviceMesh]) -> DeviceMesh:
    """The mesh over whose one axis the model is spread."""
    named = [mesh for mesh in meshes if mesh.mesh_dim_names]
    if len(named) < len(meshes) or len(named) != 1 or named[0].ndim != 1:
        found = ", ".join(f"{mesh.mesh_dim_names or 'no name'} {mesh.shape}" for mesh in meshes)
        raise PlanError(
            f"replicas need a model on one mesh of one axis with a name, and it lies on: {found}. "
            'Spread it over a mesh as in init_device_mesh(device, (4,), mesh_dim_names=("tp",)).'
        )
    return named[0]


def _own_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's module whose regions, too, can be changed."""
    new = copied(module)
    for name, child in list(new.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(new, name, _own_copy(child))
    return new


def _inputs(module: fx.GraphModule) -> list[fx.Node]:
    return module.graph.find_nodes(op="placeholder")


def _role_of(node: fx.Node, example: object) -> Role:
    """What an input is; tokens can be only in what the caller gave."""
    if _is_parameter(example):
        return Role.PARAMETER
    return Role.BUFFER if is_of_module(node) else Role.INPUT
