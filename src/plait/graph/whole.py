"""Capture a module as one flat graph by AOTAutograd: for what cannot be composed from templates.

It knows every case, such as buffers that change and results that share memory with inputs, at the
price of tracing each layer.
"""

# pyright: basic
# (AOTAutograd is not typed.)

from contextlib import ExitStack
from typing import Any

from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTOutput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses.fake_tensor import FakeTensorMode

from plait.errors import GraphError
from plait.graph.compose import Names
from plait.graph.eager_kernels import kernels_of_eager
from plait.graph.graph import Graph, Module, Role, describe
from plait.graph.inline import inline_regions
from plait.graph.sources import name_sources

AS_EAGER = {
    # Eager's backward runs outside of the autocast of the forward.
    "backward_pass_autocast": "off",
    # Nothing here overwrites saved values, so a second backward may use them.
    "donated_buffer": False,
}


def compose_whole(module: Module, fake_mode: FakeTensorMode, names: Names) -> Graph:
    """Make the joint graph of a module from TorchDynamo, without templates."""
    inline_regions(module)
    module.recompile()
    inputs = module.graph.find_nodes(op="placeholder")
    examples = tuple(node.meta["example_value"] for node in inputs)
    with ExitStack() as stack, functorch_config.patch(AS_EAGER), kernels_of_eager():
        exported = aot_export_joint_with_descriptors(stack, module, examples)
    root: Any = exported.graph_module
    name_sources(root)
    described = [names[node] for node in inputs]
    placeholders = root.graph.find_nodes(op="placeholder")
    tangents = placeholders[len(inputs) :]
    values = [
        describe(*described[i], node.meta["val"])
        for i, node in enumerate(placeholders[: len(inputs)])
    ]
    values += [describe(Role.TANGENT, str(i), node.meta["val"]) for i, node in enumerate(tangents)]
    (results,) = root.graph.output_node().args
    descriptions = root.graph.output_node().meta["desc"]
    outputs = []
    for node, description in zip(results, descriptions, strict=True):
        if node is None:
            continue
        outputs.append(describe(*_output(description, described), node.meta["val"]))
    root.graph.output_node().args = (tuple(node for node in results if node is not None),)
    num_forward = sum(value.role is not Role.GRADIENT for value in outputs)
    return Graph(root, {}, tuple(values), tuple(outputs), num_forward)


def _output(description: Any, inputs: list[tuple[Role, str]]) -> tuple[Role, str]:
    if isinstance(description, PlainAOTOutput):
        return Role.OUTPUT, str(description.idx)
    if isinstance(description, InputMutationAOTOutput):
        return Role.UPDATE, inputs[_index(description.mutated_input)][1]
    if isinstance(description, GradAOTOutput):
        return Role.GRADIENT, inputs[_index(description.grad_of)][1]
    raise GraphError(f"the program has a result that Plait does not know: {description}")


def _index(description: Any) -> int:
    return int(description.idx)
