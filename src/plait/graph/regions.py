"""Repeated blocks, marked while TorchDynamo reads the model: one capture per kind of layer.

A member of a `ModuleList` or `Sequential` that stands there beside others of its class is a block.
When a model is captured for Plait, a call of a block is traced as a region of its own
(`invoke_subgraph`), and Dynamo reuses the trace for the next block whose guards hold. The user's
classes are not touched. A block that cannot be a region (it prints, its output shares memory with
an input, ...) makes Dynamo start the frame again with that class captured flat; the reason is kept.
"""

# pyright: basic
# (TorchDynamo is not typed.)

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from itertools import count
from typing import Any, NoReturn

from torch import nn
from torch._dynamo import exc
from torch._dynamo.guards import (
    GUARD_VALUE_DISPATCH,
    SKIP_GUARD,
    GuardBuilder,
    install_guard,
)
from torch._dynamo.source import AttrSource
from torch._dynamo.variables import higher_order_ops
from torch._dynamo.variables import invoke_subgraph as dynamo_regions
from torch._dynamo.variables.functions import UserFunctionVariable
from torch._dynamo.variables.higher_order_ops import TorchHigherOrderOperatorVariable
from torch._dynamo.variables.lists import TupleVariable
from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable
from torch._dynamo.variables.tensor import TensorVariable
from torch._dynamo.variables.user_defined import UserDefinedObjectVariable
from torch._guards import ChainedSource
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

from plait.graph.breaks import explain_break
from plait.graph.modes import Modes, current_modes
from plait.graph.torch_release import attribute_of

_MIN_REPEATS = 2
_ANY_NUMBER = 10**9
_serial = count()


@dataclass
class Blocks:
    """What a backend knows of the blocks of its models; a backend that wants them has one."""

    refused: dict[type, str] = field(default_factory=dict)
    inside: type | None = None  # the block that is being traced
    takes_hooks: bool = False  # hooks are traced; that none is added later is nobody's concern

    def refuse(self, block: type, reason: str) -> None:
        """Capture this class flat from now on. reason: TorchDynamo's, kept in plain words."""
        plain, advice = explain_break(reason)
        self.refused.setdefault(block, f"{plain}; to avoid it: {advice}" if advice else plain)


_marking: ContextVar[Blocks | None] = ContextVar("marking", default=None)
_tracing: ContextVar[Blocks | None] = ContextVar("tracing", default=None)


@contextmanager
def marking_blocks(blocks: Blocks) -> Iterator[None]:
    """Mark blocks in whatever Dynamo reads here, whichever backend asked for it."""
    watch_blocks()
    token = _marking.set(blocks)
    try:
        yield
    finally:
        _marking.reset(token)


def watch_blocks() -> None:
    """Let Dynamo ask `Blocks` at each call of a module; without them nothing changes."""
    UnspecializedNNModuleVariable.call_function = _call_function
    dynamo_regions.is_reusable = _is_reusable
    dynamo_regions.stamp_out_subgraph = _reuse
    higher_order_ops.taint_filtered_vt = _taint
    GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT = _no_hooks_of_module  # type: ignore[assignment]
    GUARD_VALUE_DISPATCH[_as_traced.__name__] = SKIP_GUARD  # not compared when a trace is reused


_call_flat = UnspecializedNNModuleVariable.call_function
_is_reusable_now = dynamo_regions.is_reusable
_guard_empty_dict = GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT
_stamp_out = dynamo_regions.stamp_out_subgraph
_taint_now = higher_order_ops.taint_filtered_vt
_clone = ChainedSource.clone


def _is_reusable(tx, condition, fingerprint, entry) -> bool:
    """Note the condition under which a trace is reused, for `_reuse`."""
    moved: dict[ChainedSource, Any] = {}
    with _cloning_once(moved):
        is_reusable = _is_reusable_now(tx, condition, fingerprint, entry)
    if is_reusable:
        entry.met = condition, moved
    return is_reusable


@contextmanager
def _cloning_once(moved: dict[ChainedSource, Any]) -> Iterator[None]:
    """Clone each part of a source once for a block: sources share most of their length."""

    def clone(self, transform_fn=None):
        found = moved.get(self)
        if found is None:
            found = moved[self] = _clone(self, transform_fn)
        return found

    ChainedSource.clone = clone
    try:
        yield
    finally:
        ChainedSource.clone = _clone


def _reuse(tx, fingerprint, entry):
    """Reuse a trace with its guards, restated for the block that reuses it.

    Dynamo checks them before it reuses a trace, but leaves no guard behind: a later change of the
    second block would go unnoticed.
    """
    condition, moved = entry.met
    with _cloning_once(moved):
        result = _stamp_out(tx, fingerprint, entry)
    given = dynamo_regions.build_source_replacement(entry.arg_sources, fingerprint.arg_sources)
    for source, _, _, guard in condition.guards:
        new_source: Any = moved.get(source) or given.get(source, source)
        kind = guard.create_fn_name()
        if kind == "EMPTY_NN_MODULE_HOOKS_DICT":
            continue  # `_as_traced` is for all of the block
        if kind != "TENSOR_MATCH":
            install_guard(new_source.make_guard(guard.create_fn))
            continue
        there = {g.create_fn_name() for g in tx.output.guards.get_guards_for_source(new_source)}
        if kind not in there:
            # Shared with a block before it, or read for its shape only: not an input of its own.
            install_guard(new_source.make_guard(GuardBuilder.ID_MATCH))
    return result


def _as_traced(builder, guard) -> None:
    """Guard: no module of the block was replaced, nor has got a hook or a `forward` of its own."""
    block = builder.get(guard)
    modules = list(block.modules())
    _guarded(builder).update(id(module) for module in modules)
    hooks = [getattr(module, name) for module in modules for name in _HOOKS]
    hooks += _hooks_of_all()
    children = [(m._modules, name, x) for m in modules for name, x in m._modules.items()]
    own = [(vars(module), vars(module).get("forward")) for module in modules]

    def holds(_) -> bool:
        return (
            not any(hooks)
            and all(siblings.get(name) is x for siblings, name, x in children)
            and all(attributes.get("forward") is forward for attributes, forward in own)
        )

    builder.get_guard_manager(guard).add_lambda_guard(
        holds, [f"{guard.name} has its modules, and no hooks"], guard.user_stack
    )


def _structure(block: nn.Module) -> tuple:
    """What two blocks of a class must share besides the guards, which say nothing of types inside.

    (PyTorch 2.13 looks for the guards of a module under another name than they are kept under.)
    """
    return tuple((name, type(x), vars(x).get("forward")) for name, x in block.named_modules())


def _no_hooks_of_module(builder, guard) -> None:
    """Guard, in the place of Dynamo's, which is left out by default: the module has got no hook.

    Dynamo asks once for each of a module's dictionaries of hooks; one guard is for all of them.
    """
    blocks = _blocks_of(builder.check_fn_manager.output_graph.compiler_fn)
    if blocks is None or blocks.takes_hooks or not isinstance(guard.originating_source, AttrSource):
        _guard_empty_dict(builder, guard)
        return
    of_module = guard.originating_source.base.make_guard(_no_hooks_of_module)
    module = builder.get(of_module)
    if id(module) in _guarded(builder):
        return
    everywhere = [] if _guarded(builder) else _hooks_of_all()
    _guarded(builder).add(id(module))
    names = [name for name in _HOOKS if not getattr(module, name)]  # the others are traced
    builder.get_guard_manager(of_module).add_lambda_guard(
        lambda now: not (any(everywhere) or any(getattr(now, name, True) for name in names)),
        [f"{of_module.name} has no hooks"],
        guard.user_stack,
    )


def _hooks_of_all() -> list[dict]:
    """Where hooks of every module would be; what is there already is traced."""
    names = (f"_global{name}" for name in _HOOKS)
    return [found for name in names if not (found := getattr(nn.modules.module, name))]


def _guarded(builder) -> set[int]:
    """Ids of the modules whose hooks have a guard; those inside of a block share the block's."""
    return vars(builder).setdefault("plait_modules_without_hooks", set())


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _call_function(self, tx, args, kwargs):
    blocks = _marking.get() or _blocks_of(tx.output.compiler_fn)
    if blocks is None or blocks.inside or not _is_block(self, tx, blocks):
        return _call_flat(self, tx, args, kwargs)
    block = type(self.value)
    leaves: list = []
    form = tuple(_flatten(x, tx, leaves) for x in args)
    named = tuple((name, _flatten(x, tx, leaves)) for name, x in kwargs.items())
    given = [leaf.as_proxy().node for leaf in leaves if isinstance(leaf, TensorVariable)]
    if len(set(given)) < len(given):
        return _call_flat(self, tx, args, kwargs)
    blocks.inside = block
    token = _tracing.set(blocks)
    try:
        region = TorchHigherOrderOperatorVariable.make(invoke_subgraph)
        function = UserFunctionVariable(
            _region_function(block, form, named, current_modes(), _structure(self.value))
        )
        if not blocks.takes_hooks:
            install_guard(self.source.make_guard(_as_traced))
        return region.call_function(tx, [function, self, *leaves], {})
    except (exc.RestartAnalysis, exc.SkipFrame):
        raise
    except (
        exc.UncapturedHigherOrderOpError,
        exc.Unsupported,
        RuntimeError,
        AssertionError,  # of Dynamo, in PyTorch 2.11, where a number became a tensor outside
    ) as error:
        _start_again(blocks, block, _first_line(error), error)
    finally:
        blocks.inside = None
        _tracing.reset(token)


def _start_again(
    blocks: Blocks, block: type, reason: str, error: BaseException | None = None
) -> NoReturn:
    """Let Dynamo read the frame anew, and this class of block flat."""
    blocks.refuse(block, reason)
    restart = f"{block.__name__} cannot be captured as a block"
    raise exc.UnspecializeRestartAnalysis(restart_reason=restart) from error


def _taint(variable) -> None:
    """Mark a tensor of a block that cannot be a result of it, as it shares memory with another.

    If it is used outside all the same, as what a layer puts in a cache is, the block is read flat.
    """
    _taint_now(variable)
    blocks = _tracing.get()
    if blocks is not None and blocks.inside is not None:
        block = blocks.inside
        reason = "it leaves behind a tensor that shares memory with its inputs or results"
        variable.as_proxy = lambda: _start_again(blocks, block, reason)


def _blocks_of(compiler: Callable | None) -> Blocks | None:
    """The backend's `blocks`, under the wrappers that torch.compile puts around it."""
    for _ in range(8):
        if compiler is None:
            return None
        blocks = getattr(compiler, "blocks", None)
        if isinstance(blocks, Blocks):
            return blocks
        compiler = getattr(compiler, "_torchdynamo_orig_backend", None) or getattr(
            compiler, "compiler_fn", None
        )
    return None


def _is_block(variable: UnspecializedNNModuleVariable, tx, blocks: Blocks) -> bool:
    module: Any = variable.value
    if type(module) in blocks.refused or variable.source is None:
        return False
    if not any(True for _ in module.children()) or tx.output.current_tracer.parent is not None:
        return False  # too small to matter, or inside of another region
    if not blocks.takes_hooks and any(_has_hooks(each) for each in module.modules()):
        return False
    parent = _parent(variable, tx)
    if not isinstance(parent, nn.ModuleList | nn.Sequential):
        return False
    return sum(type(child) is type(module) for child in parent) >= _MIN_REPEATS


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in _HOOKS)


def _parent(variable: UnspecializedNNModuleVariable, tx) -> object:
    source = variable.source
    while (source := getattr(source, "base", None)) is not None:
        value = tx.output.resolve_source_value(source)
        if isinstance(value, nn.Module) and value is not variable.value:
            return value
    return None


def _flatten(variable, tx, leaves: list) -> tuple:
    """Append the leaves of an argument, and return its form, from which `_build` makes it again.

    Dynamo compares calls leaf by leaf; it flattens structures too, but by tracing pytree's code,
    which takes longer than all else. Only what never changes is taken apart: the block gets a copy.
    """
    variable = variable.realize()
    if isinstance(variable, TupleVariable) and variable.python_type() is tuple:
        return ("tuple", tuple(_flatten(item, tx, leaves) for item in variable.items))
    if isinstance(variable, UserDefinedObjectVariable) and is_dataclass(variable.value):
        kind: Any = type(variable.value)
        is_global = getattr(sys.modules[kind.__module__], kind.__name__, None) is kind
        if is_global and kind.__dataclass_params__.frozen and not hasattr(kind, "__post_init__"):
            names = tuple(f.name for f in fields(kind))
            parts = tuple(_flatten(attribute_of(variable, tx, name), tx, leaves) for name in names)
            return ("dataclass", _maker(kind, names), parts)
    leaves.append(variable)
    return ("leaf",)


@cache
def _maker(kind: type, names: tuple[str, ...]) -> Callable:
    """A function that makes a dataclass, for Dynamo one of the class's own module."""
    arguments = ", ".join(names)
    given = ", ".join(f"{name}={name}" for name in names)
    code = compile(
        f"lambda {arguments}: {kind.__name__}({given})", f"<make {kind.__name__}>", "eval"
    )
    return types.FunctionType(code.co_consts[0], vars(sys.modules[kind.__module__]))


def _build(form: tuple, leaves: list):
    if form[0] == "leaf":
        return leaves.pop(0)
    if form[0] == "dataclass":
        return form[1](*[_build(part, leaves) for part in form[2]])
    return tuple([_build(part, leaves) for part in form[1]])


@cache
def _region_function(
    block: type, form: tuple, named: tuple, modes: Modes, structure: tuple
) -> Callable:
    """Dynamo keeps its traces by code object, so what it does not compare is in the key."""

    def run(module, *operands):
        leaves = list(operands)
        args = [_build(part, leaves) for part in form]
        kwargs = {name: _build(part, leaves) for name, part in named}
        return module(*args, **kwargs)

    name = f"block_{block.__name__}_{next(_serial)}"
    function = types.FunctionType(
        run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__
    )
    # Layers with a constant of their own are each traced; that is no reason to fail.
    function.__marked_compile_region_max_reuse_entries__ = _ANY_NUMBER
    return function


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    details = [line for line in lines if line.startswith(("Explanation:", "subgraph_reuse:"))]
    return (details or lines or [type(error).__name__])[0].removeprefix("Explanation:").strip()
