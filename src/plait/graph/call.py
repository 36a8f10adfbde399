"""The `call` node: a higher-order operator that stands for running a template.

It exists in graphs only. While a graph is traced, a call yields new fake tensors of the recorded
shapes, in microseconds, where tracing the block again would take a tenth of a second. The generated
program replaces it by a call of the template's own program.
"""

# pyright: basic
# (The operator protocol of torch is not typed.)

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, track_tensor_tree

from plait.graph.graph import BACKWARD, FORWARD, Role, Template

_templates: ContextVar[dict[str, Template]] = ContextVar("templates")


class _Call(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__("plait_call")

    def __call__(self, template: str, part: str, *operands: Tensor) -> tuple:
        return super().__call__(template, part, *operands)


call = _Call()


@contextmanager
def calling(templates: dict[str, Template]):
    """Let calls find their templates, while a graph is traced."""
    token = _templates.set(templates)
    try:
        yield
    finally:
        _templates.reset(token)


class TemplateFunction:
    """Callable that puts a call of `template` into the graph being traced, with its gradient."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.__name__ = template.name

    def __call__(self, *operands: Tensor) -> tuple[Tensor, ...]:
        """Results, then the threaded arguments."""
        template = self.template
        if template.backward is None:
            return call(template.name, FORWARD, *operands)
        with fx_traceback.preserve_node_meta():
            return _Differentiable.apply(template, *operands)


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, template: Template, *operands: Tensor) -> tuple[Tensor, ...]:
        outputs = call(template.name, FORWARD, *operands)
        num_results = len(template.results)
        results, computed = outputs[:num_results], iter(outputs[num_results:])
        ctx.template = template
        ctx.save_for_backward(
            *(
                operands[int(value.name)] if value.role is Role.INPUT else next(computed)
                for value in template.saved
            )
        )
        ctx.mark_non_differentiable(
            *(x for i, x in enumerate(results) if i not in template.differentiable)
        )
        return (*results, *(operands[i] for i in template.threaded))

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        template = ctx.template
        tangents = [gradients[i] for i in template.differentiable]
        tangents += gradients[len(template.results) :]
        yielded = iter(call(template.name, BACKWARD, *ctx.saved_tensors, *tangents))
        return (None, *(None if value is None else next(yielded) for value in template.gradients))


@call.py_impl(DispatchKey.CompositeExplicitAutograd)
def _(template: str, part: str, *operands: Tensor) -> tuple:
    message = "a call node stands in graphs only; the executor runs the template's program"
    raise RuntimeError(message)


@call.py_autograd_impl
def _(template: str, part: str, *operands: Tensor) -> tuple:
    with torch._C._AutoDispatchBelowAutograd():
        return call(template, part, *operands)


@call.py_functionalize_impl
def _(ctx, template: str, part: str, *operands: Tensor) -> tuple:
    with ctx.redispatch_to_next():
        outputs = call(template, part, *ctx.unwrap_tensors(operands))
    return ctx.wrap_tensors(outputs)


@call.py_impl(FakeTensorMode)
def _(mode: FakeTensorMode, template: str, part: str, *operands: Tensor) -> tuple:
    return _empty_outputs(mode, template, part)


@call.py_impl(ProxyTorchDispatchMode)
def _(mode: ProxyTorchDispatchMode, template: str, part: str, *operands: Tensor) -> tuple:
    fake_mode = next(x.fake_mode for x in operands if hasattr(x, "fake_mode"))
    outputs = _empty_outputs(fake_mode, template, part)
    proxies = tuple(mode.tracer.unwrap_proxy(x) for x in operands)
    proxy = mode.tracer.create_proxy("call_function", call, (template, part, *proxies), {})
    return track_tensor_tree(outputs, proxy, constant=None, tracer=mode.tracer)


def _empty_outputs(mode: FakeTensorMode, template: str, part: str) -> tuple[Tensor, ...]:
    values = _templates.get()[template].yields(part)
    with mode:
        return tuple(
            torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)
            for value in values
        )
