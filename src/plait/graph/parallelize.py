"""A model spread over the ranks of the axis `tp`, in place: `parallelize(model, plan, mesh)`.

Each module gets a subclass of its own class, as its rule says: its parameters become DTensors, its
code reads the rank's part of them as plain tensors, and what the ranks exchange stands before and
after it. No hooks, no DTensor between or inside modules: a layer remains a layer of its kind, which
TorchDynamo reads as it reads the model's own code.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from plait.errors import PlanError
from plait.graph.exchange import (
    Exchange,
    RankOfAxis,
    gather_tokens,
    own_tokens,
    spread,
    sum_own_tokens,
    sum_up,
    whole_features,
    whole_tokens,
)
from plait.graph.parallel_modules import Form, Kind, parallel_class
from plait.plan.find_rules import find_rules
from plait.plan.parallel_plan import ParallelPlan
from plait.plan.rules import GivenRules, Rule, Style


@dataclass(frozen=True)
class Sharing:
    """How a parameter is shared: along a dim, or not at all (None).

    sections: sizes, along that dim, of the parts of a fused layer. Each rank holds its part of each
    section, one after the other; so the DTensor counts elements in the order of ranks, and
    `whole_parameter` restores the model's own order.
    """

    dim: int | None
    sections: tuple[int, ...] = ()


_WHOLE = Sharing(None)


def parallelize(
    model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh, *, rules: GivenRules | None = None
) -> nn.Module:
    """Spread a model (real, fake or meta) over mesh["tp"], in place; return it.

    Every rank must hold the same values before, of which it keeps its own part, and draw the same
    random numbers (one seed), for what dropout does to whole values. Afterwards every
    parameter is a DTensor on mesh["tp"]; the model takes and returns the same plain tensors as
    before, equal on all ranks. Gradients that ranks know in part only are summed in the backward.

    rules: see `plait.plan.find_rules`. Raises PlanError as that does, and if a parameter
    cannot be shared evenly or two modules want to share the same parameter in different ways.
    """
    if plan.tp == 1:
        return model
    if any("parallel_axis" in vars(module) for module in model.modules()):
        raise PlanError("the model is spread already. Spread a fresh copy of it.")
    tp = mesh["tp"]
    if tp.size() != plan.tp:
        raise PlanError(f"the plan has tp={plan.tp}, the mesh {tp.size()}. Make them equal.")
    found = find_rules(model, plan, rules=rules)
    axis = RankOfAxis(str(tp.get_group().group_name), plan.tp, tp.get_local_rank())
    modules = {name: model.get_submodule(name) for name in found}
    sharings = {name: _sharings(name, modules[name], rule, plan.tp) for name, rule in found.items()}
    _check_tied(modules, sharings)
    placed: dict[int, nn.Parameter] = {}
    for name, module in modules.items():
        _place(module, sharings[name], tp, placed)
    branches = {name for name, rule in found.items() if rule.style is Style.BRANCH}
    for name, module in modules.items():
        is_inside = any(name.startswith(f"{branch}.") for branch in branches)
        _specialize(module, found[name], axis, sp=plan.sp, is_inside=is_inside)
        if found[name].style is Style.LAYER:
            module.__dict__["is_first_layer"] = name.endswith(".0")
    return model


def whole_parameter(model: nn.Module, name: str, part: DTensor) -> Tensor:
    """Gather a parameter of this name, or its gradient, in the order of the unspread model."""
    owner, _, own = name.rpartition(".")
    sharing: Sharing = model.get_submodule(owner).__dict__["parallel_sharings"][own]
    whole = part.full_tensor()
    if sharing.dim is None or not sharing.sections:
        return whole
    size = part.device_mesh.size()
    sizes = [n // size for n in sharing.sections]
    ranks = [_split(x, sizes, sharing.dim) for x in whole.chunk(size, sharing.dim)]
    sections = [torch.cat([parts[i] for parts in ranks], sharing.dim) for i in range(len(sizes))]
    return torch.cat(sections, sharing.dim)


def keep_local_parameters(model: nn.Module) -> nn.Module:
    """Replace every DTensor of a spread model by the rank's plain part of it, in place.

    For a copy that is captured: its program then takes plain tensors only.
    """
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                if id(parameter) not in replaced:
                    local = parameter.to_local().detach()
                    replaced[id(parameter)] = nn.Parameter(
                        local, requires_grad=parameter.requires_grad
                    )
                module.register_parameter(name, replaced[id(parameter)])
    return model


def _is_transposed(module: nn.Module) -> bool:
    """Whether the weight is (in, out): transformers' Conv1D, the layer of GPT-2."""
    return type(module).__name__ == "Conv1D"


def _sharings(name: str, module: nn.Module, rule: Rule, tp: int) -> dict[str, Sharing]:
    own = dict(module.named_parameters(recurse=False))
    columns, rows = (1, 0) if _is_transposed(module) else (0, 1)
    match rule.style:
        case Style.COLUMN | Style.COLUMN_GATHERED:
            dims: dict[str, int] = {"weight": columns, "bias": 0}
        case Style.ROW:
            dims = {"weight": rows}
        case Style.VOCABULARY | Style.VOCABULARY_SPLIT | Style.WIDE_NORM:
            dims = {"weight": 0}
        case _:
            return dict.fromkeys(own, _WHOLE)
    if "weight" not in own or not set(own) <= {"weight", "bias"}:
        raise PlanError(
            f"{name} has the parameters {', '.join(own) or 'none'}; the style {rule.style!r} "
            "is for modules with a weight and perhaps a bias."
        )
    for each, dim in dims.items():
        if each in own:
            _check_sections(f"{name}.{each}", own[each], dim, rule, tp)
    return {each: Sharing(dims[each], rule.sections) if each in dims else _WHOLE for each in own}


def _check_sections(name: str, parameter: Tensor, dim: int, rule: Rule, tp: int) -> None:
    length = parameter.shape[dim]
    sections = rule.sections or (length,)
    if sum(sections) != length:
        raise PlanError(
            f"the sections of {name} are {sections}, {sum(sections)} together, and its dim {dim} "
            f"has {length}."
        )
    if any(section % tp for section in sections):
        legal = [n for n in range(1, min(sections) + 1) if not any(s % n for s in sections)]
        sizes = ", ".join(map(str, sections))
        raise PlanError(
            f"tp={tp} does not divide {name}, dim {dim} ({sizes}). "
            f"Choose tp from {', '.join(map(str, legal))}."
        )


def _check_tied(modules: dict[str, nn.Module], sharings: dict[str, dict[str, Sharing]]) -> None:
    """One parameter of two modules must be shared in one way."""
    known: dict[int, tuple[str, Sharing]] = {}
    for name, module in modules.items():
        for own, parameter in module.named_parameters(recurse=False):
            first, sharing = known.setdefault(id(parameter), (name, sharings[name][own]))
            if sharing != sharings[name][own]:
                raise PlanError(
                    f"{first} and {name} are tied, and their rules share the weight differently. "
                    f'Give both "whole", or rules={{"{first}": "vocabulary", '
                    f'"{name}": "column_gathered"}}.'
                )


def _place(
    module: nn.Module,
    sharings: dict[str, Sharing],
    tp: DeviceMesh,
    placed: dict[int, nn.Parameter],
) -> None:
    """Make DTensors of the module's own parameters; tied ones stay tied (`placed`)."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if id(parameter) not in placed:
            shared = _shared(parameter.detach(), sharings[name], tp)
            placed[id(parameter)] = nn.Parameter(shared, requires_grad=parameter.requires_grad)
            placed[id(placed[id(parameter)])] = placed[id(parameter)]
        module.register_parameter(name, placed[id(parameter)])
    module.__dict__["parallel_sharings"] = sharings


def _shared(x: Tensor, sharing: Sharing, tp: DeviceMesh) -> DTensor:
    dim = sharing.dim
    if dim is None:
        return DTensor.from_local(x, tp, [Replicate()], run_check=False)
    parts = _split(x, sharing.sections, dim) if sharing.sections else [x]
    own = [distribute_tensor(part, tp, [Shard(dim)], src_data_rank=None) for part in parts]
    if len(own) == 1:
        return own[0]
    local = torch.cat([part.to_local() for part in own], dim)
    return DTensor.from_local(local, tp, [Shard(dim)], run_check=False)


def _split(x: Tensor, sizes: Sequence[int], dim: int) -> list[Tensor]:
    return list(torch.split_with_sizes(x, list(sizes), dim))


def _specialize(
    module: nn.Module, rule: Rule, axis: RankOfAxis, *, sp: bool, is_inside: bool
) -> None:
    """Give a module its subclass, and its counts their local values."""
    if _is_transposed(module) and rule.style is Style.COLUMN:
        rule = Rule(rule.style, rule.sections, (*rule.divided, "nf"))
    for attribute in rule.divided:
        _divide(module, attribute, axis.size)
    names = tuple(name for name, _ in module.named_parameters(recurse=False))
    form = _form(rule.style, names, sp=sp, is_inside=is_inside)
    if form.kind is Kind.VOCABULARY and getattr(module, "padding_idx", None) is not None:
        raise PlanError(
            "an embedding with a padding_idx cannot have the style 'vocabulary'. "
            "Give it 'whole', or set its padding_idx to None."
        )
    if form == Form():
        return
    module.__dict__["parallel_axis"] = axis
    module.__class__ = parallel_class(type(module), form)


def _form(style: Style, names: tuple[str, ...], *, sp: bool, is_inside: bool) -> Form:
    whole_input: Exchange = gather_tokens if sp else spread
    all_summed = frozenset(names)
    match style:
        case Style.TOKENWISE:
            return Form(names, all_summed if sp else frozenset())
        case Style.TOKENWISE_GATHERED:
            summed = all_summed if sp else frozenset[str]()
            return Form(names, summed, leave=whole_tokens if sp else None)
        case Style.HEADWISE:
            return Form(names, all_summed)
        case Style.COLUMN:
            return Form(names, enter=None if is_inside else whole_input)
        case Style.COLUMN_GATHERED:
            return Form(names, enter=spread, leave=whole_features)
        case Style.ROW:
            summed = all_summed - {"weight"} if sp else frozenset[str]()
            return Form(names, summed, leave=sum_own_tokens if sp else sum_up, kind=Kind.ROW)
        case Style.BRANCH:
            return Form(names, enter=whole_input)
        case Style.LAYER:
            return Form(names, enter=own_tokens, kind=Kind.LAYER) if sp else Form(names)
        case Style.SPLIT_OUTPUT:
            return Form(names, leave=own_tokens if sp else None)
        case Style.VOCABULARY:
            return Form(names, leave=sum_up, kind=Kind.VOCABULARY)
        case Style.VOCABULARY_SPLIT:
            return Form(names, leave=sum_own_tokens if sp else sum_up, kind=Kind.VOCABULARY)
        case Style.WIDE_NORM:
            return Form(names, kind=Kind.WIDE_NORM)
        case Style.WHOLE:
            return Form(names)


def _divide(module: Any, attribute: str, tp: int) -> None:
    """Let an attribute count what one rank has; of a config, in a copy of its own."""
    if attribute.startswith("config."):
        module.config = copy.copy(module.config)
        module, attribute = module.config, attribute.removeprefix("config.")
    setattr(module, attribute, getattr(module, attribute) // tp)
