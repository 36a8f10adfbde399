"""From one captured block to its `Template`: forward and backward, traced once."""

# pyright: basic
# (AOTAutograd and fx are not typed.)

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd.schemas import OutputType
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

from plait.graph.graph import Role, Template, describe
from plait.graph.partition import part_joint


class NotATemplate(Exception):
    """The block cannot be a template; the message is a reason in plain words."""


def trace_template(
    block: Callable[..., Sequence[Tensor]],
    operands: Sequence[Tensor],
    *,
    name: str,
    block_name: str,
    threaded: Sequence[int],
) -> Template:
    """Trace `block` on fake operands, under the autocast and grad mode that hold now.

    Raises NotATemplate where the block changes its inputs, or its results share memory with them
    or each other.
    """
    arguments = tuple(describe(Role.INPUT, str(i), x) for i, x in enumerate(operands))
    traced = _Threading(block, threaded)
    module = _trace(traced, [_detached(x) for x in operands])
    is_joint = len(module.graph.find_nodes(op="placeholder")) > len(operands) or traced.has_tangents
    _drop_detaches(module)
    (outputs,) = module.graph.output_node().args
    results = outputs[: len(traced.takes_tangent)]
    _check_results(results)
    template = Template(
        name=name,
        block=block_name,
        arguments=arguments,
        results=tuple(
            describe(Role.OUTPUT, str(i), node.meta["val"]) for i, node in enumerate(results)
        ),
        forward=module,
    )
    if is_joint:
        gradients = outputs[-len(operands) :]
        parts = part_joint(module, num_arguments=len(operands), num_results=len(results))
        template.joint = module
        template.forward, template.backward, template.saved = (
            parts.forward,
            parts.backward,
            parts.saved,
        )
        template.gradients = tuple(
            None if node is None else describe(Role.GRADIENT, str(i), node.meta["val"])
            for i, node in enumerate(gradients)
        )
        template.differentiable = tuple(
            i for i, takes_tangent in enumerate(traced.takes_tangent) if takes_tangent
        )
        template.threaded = tuple(threaded)
    return template


class _Threading(nn.Module):
    """The block, yielding also its threaded arguments; notes which results take a tangent.

    The copy is made last, so autograd visits its backward first: what comes from the later users is
    the first term of the sum. (The engine visits nodes in descending order of creation.)
    """

    def __init__(self, block: Callable, threaded: Sequence[int]) -> None:
        super().__init__()
        self.block = block
        self.threaded = threaded
        self.takes_tangent: list[bool] = []

    @property
    def has_tangents(self) -> bool:
        return any(self.takes_tangent)

    def forward(self, *operands: Tensor) -> tuple:
        results = self.block(*operands)
        self.takes_tangent = [isinstance(x, Tensor) and x.requires_grad for x in results]
        return (*results, *(operands[i].clone() for i in self.threaded))


def _trace(module: nn.Module, operands: list[Tensor]) -> fx.GraphModule:
    """The joint graph (or, where nothing needs a gradient, the forward), functional and flat."""
    with ExitStack() as stack:
        exported = aot_export_joint_with_descriptors(stack, module, tuple(operands))
        metadata = exported._aot_state.fw_metadata
    if any(each.mutates_data or each.mutates_metadata for each in metadata.input_info):
        raise NotATemplate("it changes one of its inputs or buffers in place")
    if any(each.output_type is not OutputType.non_alias for each in metadata.output_info):
        raise NotATemplate("one of its results shares memory with an input or another result")
    if metadata.tokens:
        raise NotATemplate("it has side effects that must stay in order")
    return exported.graph_module


def _detached(x: Tensor) -> Tensor:
    """A new fake tensor of the same form, so that the trace starts at it."""
    with x.fake_mode:
        fresh = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return fresh.requires_grad_(x.requires_grad)


def _drop_detaches(joint: fx.GraphModule) -> None:
    """Autograd leaves `detach` where it saved a result; in a graph it is that result."""
    for node in joint.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        joint.graph.erase_node(node)


def _check_results(results: Sequence[fx.Node]) -> None:
    if any(not isinstance(node, fx.Node) for node in results):
        raise NotATemplate("it returns something that is not a tensor")
    if len({node.name for node in results}) < len(results):
        raise NotATemplate("it returns the same tensor twice")
    if any(node.op == "placeholder" for node in results):
        raise NotATemplate("it returns one of its inputs")
