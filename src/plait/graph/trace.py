"""From a piece of a program to its `Template`: forward and backward, traced once on fake tensors.

The forward runs under the piece's own modes, the backward under none, as in eager; autograd decides
which kernels the backward uses and in which order gradients are summed, so the bits are eager's.
"""

# pyright: basic
# (fx, functionalization and proxies are not typed.)

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch._aot_autograd.functional_utils import (
    from_fun,
    has_data_mutation,
    has_metadata_mutation,
    to_fun,
)
from torch._functorch._aot_autograd.graph_capture_wrappers import set_partitioner_tag_is_backward
from torch._functorch._aot_autograd.logging_utils import setup_stacktrace_preservation_hooks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx

from plait.graph.eager_kernels import kernels_of_eager
from plait.graph.graph import Module, Node, Role, Template, Value, describe
from plait.graph.modes import Modes
from plait.graph.partition import extract_forward, part_joint
from plait.graph.source import source_of
from plait.graph.sources import name_sources


class NotATemplate(Exception):
    """The piece cannot be a template; the message is a reason in plain words."""


@dataclass(frozen=True)
class Use:
    """How a piece is used: everything that its graph depends on besides its own code.

    needs_gradient: of the operands, which want one. tangents: the gradient that arrives for each
    result, None where none does. threaded: see `Template`.
    """

    operands: tuple[Value, ...]
    needs_gradient: tuple[bool, ...]
    tangents: tuple[Value | None, ...]
    threaded: tuple[int, ...]
    modes: Modes

    @property
    def has_backward(self) -> bool:
        """Whether any gradient arrives, and any is wanted."""
        arrives = any(x is not None for x in self.tangents) or bool(self.threaded)
        return arrives and any(self.needs_gradient)


def trace(piece: Module, use: Use, *, name: str, block: str, fake_mode: FakeTensorMode) -> Template:
    """Trace a piece. Raises NotATemplate if it changes an operand in place."""
    operands = [
        _fake(x, fake_mode).requires_grad_(needs)
        for x, needs in zip(use.operands, use.needs_gradient, strict=True)
    ]
    tangents = [_fake(x, fake_mode) for x in use.tangents if x is not None]
    tangents += [_fake(use.operands[i], fake_mode) for i in use.threaded]
    traced = _Traced(piece, use)
    try:
        with fake_mode:
            module = _trace_functional(traced, operands, tangents if use.has_backward else [])
    except NotATemplate:
        raise
    except Exception as error:  # what a piece cannot do alone, the whole may: the reason is kept
        raise NotATemplate(f"{block} cannot be traced by itself: {first_line(error)}") from error
    _drop_detaches(module)
    name_sources(module)
    (outputs,) = module.graph.output_node().args
    results = outputs[: len(use.tangents)]
    template = Template(
        name=name,
        block=block,
        arguments=use.operands,
        results=_described(Role.OUTPUT, results),
        forward=module if use.has_backward else extract_forward(module),
    )
    if use.has_backward:
        gradients = outputs[len(use.tangents) :]
        parts = part_joint(module, num_arguments=len(operands), num_results=len(results))
        template.joint = module
        template.forward, template.backward = parts.forward, parts.backward
        template.saved = parts.saved
        template.gradients = tuple(
            None if node is None else describe(Role.GRADIENT, str(i), node.meta["val"])
            for i, node in enumerate(gradients)
        )
        template.differentiable = tuple(i for i, x in enumerate(use.tangents) if x is not None)
        template.threaded = use.threaded
    return template


class _Traced:
    """What is traced: the piece, then autograd's backward of it."""

    def __init__(self, piece: Module, use: Use) -> None:
        self.piece = piece
        self.use = use

    def user_of(self, i: int) -> str:
        """What takes an operand first: the operator, and the line that it comes from."""
        user = next(iter(self.piece.graph.find_nodes(op="placeholder")[i].users), None)
        if user is None:
            return "what nothing takes"
        target = getattr(user.target, "__name__", str(user.target))
        return f"{target} ({source_of(user)})"

    def __call__(self, operands: list[Tensor], tangents: list[Tensor]) -> list[Tensor | None]:
        use = self.use
        with use.modes.entered():
            results = fx.Interpreter(self.piece).run(*operands)
            # Made last, so autograd visits it first: what comes back from the later users is the
            # first term of the sum. (The engine visits nodes in descending order of creation.)
            handed = [operands[i].view_as(operands[i]) for i in use.threaded]
        results = list(results)
        if not use.has_backward:
            return [x.detach() if isinstance(x, Tensor) else x for x in results]
        wanted = [x for x, needs in zip(operands, use.needs_gradient, strict=True) if needs]
        arriving = [x for x, t in zip(results, use.tangents, strict=True) if t is not None]
        arriving += handed
        setup_stacktrace_preservation_hooks([x.grad_fn for x in arriving if x.grad_fn is not None])
        with set_partitioner_tag_is_backward(), fx_traceback.preserve_node_meta():
            gradients = torch.autograd.grad(arriving, wanted, tangents, allow_unused=True)
        found = iter(gradients)
        return [*results, *(next(found) if needs else None for needs in use.needs_gradient)]


def _trace_functional(traced: _Traced, operands: list[Tensor], tangents: list[Tensor]) -> Module:
    """Trace without mutations: in-place operators become new values."""
    num_operands = len(operands)

    def functional(*inputs: Tensor) -> list[Tensor | None]:
        wrapped = [to_fun(x) for x in inputs]
        outputs = traced(wrapped[:num_operands], wrapped[num_operands:])
        for i, (before, after) in enumerate(zip(inputs[:num_operands], wrapped, strict=False)):
            if has_data_mutation(after) or has_metadata_mutation(
                after, before, check_only_storage_mutation=False
            ):
                raise NotATemplate(
                    f"it changes a tensor in place that comes from outside, in {traced.user_of(i)}"
                )
        return [cast("Tensor | None", from_fun(x)) for x in outputs]

    with (
        torch._C._ExcludeDispatchKeyGuard(
            torch._C.DispatchKeySet(torch._C.DispatchKey.Functionalize)
        ),
        enable_python_dispatcher(),
        FunctionalTensorMode(),
        kernels_of_eager(),
        fx_traceback.preserve_node_meta(),
    ):
        return make_fx(functional, decomposition_table={}, record_module_stack=True)(
            *operands, *tangents
        )


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _fake(value: Value, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty_strided(
            value.shape, value.stride, dtype=value.dtype, device=value.device
        )


def _described(role: Role, nodes: Sequence[Node]) -> tuple[Value, ...]:
    if any(not isinstance(node, fx.Node) for node in nodes):
        raise NotATemplate("it returns something that is not a tensor")
    return tuple(describe(role, str(i), node.meta["val"]) for i, node in enumerate(nodes))


def _drop_detaches(module: Module) -> None:
    """Autograd leaves `detach` where it saved a result; in a graph it is that result."""
    for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
