"""Models whose parameters are `DTensor`s: their graphs hold this rank's local tensors only.

TorchDynamo leaves DTensors in its graph and hands the mesh in as an input. Here each becomes what a
rank really has: the parameter enters as its local part and is wrapped where it is used, and the
mesh is an object of the code. What is left of DTensor is then traced away (`trace.py`): its
collectives stand in the graph as operators, with the name of the mesh's axis as their group.
"""

# pyright: basic
# (TorchDynamo and DTensor are not typed.)

from collections.abc import Sequence
from typing import Any

import torch
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import plait.graph.exchange as _own_part_operator  # noqa: F401
from plait.graph.collectives import is_collective
from plait.graph.graph import Graph, Group, Module, Node


def localize(module: Module, examples: Sequence[object]) -> tuple[list[Any], list[DeviceMesh]]:
    """Take DTensors and meshes out of the inputs of Dynamo's module.

    Returns the examples of the inputs that are left (of a parameter, its DTensor), and the meshes.
    """
    inputs = module.graph.find_nodes(op="placeholder")
    special = {
        node: example
        for node, example in zip(inputs, examples, strict=True)
        if isinstance(example, DTensor | DeviceMesh)
    }
    regions: dict[str, dict[int, Any]] = {}
    for node in module.graph.find_nodes(op="call_function", target=invoke_subgraph):
        found = {i: special[x] for i, x in enumerate(node.args[2:]) if x in special}
        regions[node.args[0].target] = found
        node.args = tuple(x for x in node.args if not isinstance(special.get(x), DeviceMesh))
    for name, found in regions.items():
        region = getattr(module, name)
        placeholders = region.graph.find_nodes(op="placeholder")
        _localize(region, {placeholders[i]: example for i, example in found.items()})
    _localize(module, special)
    meshes = [x if isinstance(x, DeviceMesh) else x.device_mesh for x in special.values()]
    return [x for x in examples if not isinstance(x, DeviceMesh)], list(dict.fromkeys(meshes))


def name_groups(graph: Graph, meshes: Sequence[DeviceMesh]) -> None:
    """Let collectives name the axis of the mesh as their group; a rank's own number is not said."""
    axes: dict[str, str] = {}
    for mesh in meshes:
        for axis in mesh.mesh_dim_names or ():
            axes[mesh.get_group(axis).group_name] = axis
            graph.groups[axis] = Group(mesh[axis].size(), mesh.get_local_rank(axis))
    modules = [graph.root]
    for template in graph.templates.values():
        parts = (template.joint, template.forward, template.backward)
        modules += [part for part in parts if part is not None]
    for module in modules:
        for node in module.graph.nodes:
            if is_collective(node) or node.target is torch.ops.plait.own_part.default:
                is_named = any(isinstance(x, str) and x in axes for x in node.args)
                node.args = tuple(axes.get(x, x) if isinstance(x, str) else x for x in node.args)
                if is_named and node.target is torch.ops.plait.own_part.default:
                    node.args = (*node.args[:3], 0, node.args[4])  # known when it runs


def _localize(module: Module, special: dict[Node, Any]) -> None:
    """Let inputs be local tensors, made DTensors again at each use; meshes are no inputs."""
    for node, example in special.items():
        for user in list(node.users):
            if user.target is invoke_subgraph:
                continue
            with module.graph.inserting_before(user):
                if isinstance(example, DeviceMesh):
                    new = _mesh(module, example)
                else:
                    new = _wrapped(module, node, example)
            user.replace_input_with(node, new)
        if isinstance(example, DeviceMesh):
            module.graph.erase_node(node)
        else:
            local = example._local_tensor.detach()
            node.meta["example_value"] = local.requires_grad_(example.requires_grad)
    module.recompile()


def _wrapped(module: Module, node: Node, example: DTensor) -> Node:
    mesh = _mesh(module, example.device_mesh)
    wrapped = module.graph.call_function(
        DTensor.from_local,
        (node, mesh, tuple(example.placements)),
        {"run_check": False, "shape": example.shape, "stride": example.stride()},
    )
    wrapped.meta["example_value"] = example
    return wrapped


def _mesh(module: Module, mesh: DeviceMesh) -> Node:
    """The mesh as an object that the code holds."""
    number = 0
    while getattr(module, name := f"mesh_{number}", mesh) is not mesh:
        number += 1
    setattr(module, name, mesh)
    return module.graph.create_node("get_attr", name)
