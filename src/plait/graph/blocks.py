"""Regions of a captured graph become calls of templates; what cannot be one is inlined.

Works on the module that TorchDynamo made: nodes of torch functions, with `invoke_subgraph` where a
block was (`regions.py`). Each region is traced once for each way it is used (which of its results,
what kind of operands, under which autocast), not once for each call.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

from plait.graph.call import TemplateFunction
from plait.graph.graph import Template
from plait.graph.template import NotATemplate, trace_template

_MODE_CHANGES = (
    torch.amp.autocast_mode._enter_autocast,
    torch.amp.autocast_mode._exit_autocast,
    torch._C._set_grad_enabled,
)


@dataclass
class Flat:
    """A block that was captured without a template, and why."""

    block: str
    reason: str


@dataclass
class Linked:
    """A module whose regions are calls; `flat` says what is not."""

    module: fx.GraphModule
    templates: dict[str, Template] = field(default_factory=dict)
    flat: list[Flat] = field(default_factory=list)


def link_blocks(module: fx.GraphModule) -> Linked:
    """Replace each region by a call of a template, or by its nodes."""
    linked = Linked(module)
    if not any(node.target is invoke_subgraph for node in module.graph.nodes):
        return linked
    _Linker(module, linked).run()
    module.graph.lint()
    module.recompile()
    return linked


class _Linker:
    def __init__(self, module: fx.GraphModule, linked: Linked) -> None:
        self.module = module
        self.linked = linked
        self.known: dict[tuple, Template | Flat] = {}
        self.exits: dict[fx.Node, torch.autocast] = {}

    def run(self) -> None:
        mode = torch.is_grad_enabled()
        try:
            for node in list(self.module.graph.nodes):
                if node.target in _MODE_CHANGES:
                    self._change_mode(node)
                elif node.target is invoke_subgraph:
                    self._link(node)
        finally:
            for context in reversed(self.exits.values()):
                context.__exit__(None, None, None)
            torch._C._set_grad_enabled(mode)

    def _change_mode(self, node: fx.Node) -> None:
        """Enter and leave modes as the program would, so that a block is traced under its own."""
        if node.target is torch.amp.autocast_mode._enter_autocast:
            self.exits[node] = node.target(*node.args)
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            node.target(self.exits.pop(node.args[0]))
        else:
            node.target(*node.args)

    def _link(self, node: fx.Node) -> None:
        region = getattr(self.module, node.args[0].target)
        operands = node.args[2:]
        values = [operand.meta["example_value"] for operand in operands]
        used = _used_results(node)
        threaded = [i for i, x in enumerate(operands) if self._is_threaded(x, values[i], node)]
        made = self._template(node, region, values, used, threaded)
        if isinstance(made, Flat):
            _inline(self.module, node, region)
        else:
            _replace(node, made, used)

    def _template(
        self, node: fx.Node, region: fx.GraphModule, values: list, used: list, threaded: list
    ) -> Template | Flat:
        if not all(isinstance(x, Tensor) and _is_static(x) for x in values):
            return self._refuse(region, "its shapes are dynamic")
        if len(set(node.args[2:])) < len(node.args[2:]):
            return self._refuse(region, "it takes the same tensor twice")
        key = (
            node.args[0].target,
            tuple((x.shape, x.stride(), x.dtype, x.device, x.requires_grad) for x in values),
            tuple(used),
            tuple(threaded),
            _modes({x.device.type for x in values}),
        )
        if key not in self.known:
            block_name = _block_name(region)
            try:
                made = trace_template(
                    _selecting(region, used),
                    values,
                    name=f"{block_name}_{len(self.linked.templates)}",
                    block_name=block_name,
                    threaded=threaded,
                )
                self.linked.templates[made.name] = made
            except NotATemplate as error:
                made = self._refuse(region, str(error))
            self.known[key] = made
        return self.known[key]

    def _refuse(self, region: fx.GraphModule, reason: str) -> Flat:
        flat = Flat(_block_name(region), reason)
        if flat not in self.linked.flat:
            self.linked.flat.append(flat)
        return flat

    @staticmethod
    def _is_threaded(operand: fx.Node, value: object, call: fx.Node) -> bool:
        """Whether users other than this call share the gradient, some of them later."""
        if not (isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()):
            return False
        return len(operand.users) > 1 and any(call < user for user in operand.users)


def _used_results(node: fx.Node) -> list[int]:
    if not node.users:
        return list(range(_num_results(node)))
    if any(user.target is not operator.getitem for user in node.users):
        return list(range(_num_results(node)))
    return sorted({user.args[1] for user in node.users if user.users})


def _num_results(node: fx.Node) -> int:
    return len(node.meta["example_value"])


def _selecting(region: fx.GraphModule, used: Sequence[int]):
    def block(*operands: Tensor) -> tuple[Tensor, ...]:
        results = region(*operands)
        return tuple(results[i] for i in used)

    return block


def _replace(node: fx.Node, template: Template, used: list[int]) -> None:
    """Put the call in the region's place; later users of threaded operands take them from it."""
    graph = node.graph
    operands = node.args[2:]
    with graph.inserting_before(node):
        call = graph.call_function(TemplateFunction(template), tuple(operands))
        call.meta = {key: node.meta[key] for key in ("stack_trace",) if key in node.meta}
        results = [graph.call_function(operator.getitem, (call, i)) for i in range(len(used))]
        for at, i in enumerate(template.threaded):
            handed = graph.call_function(operator.getitem, (call, len(used) + at))
            handed.meta["example_value"] = operands[i].meta["example_value"]
            operands[i].replace_all_uses_with(
                handed, delete_user_cb=lambda user, first=call: first < user and user is not node
            )
    for user in list(node.users):
        if user.target is operator.getitem:
            if user.users:
                result = results[used.index(user.args[1])]
                result.meta["example_value"] = user.meta.get("example_value")
                user.replace_all_uses_with(result)
            graph.erase_node(user)
        else:
            message = f"unexpected user of a region: {user.format_node()}"
            raise AssertionError(message)
    graph.erase_node(node)


def _inline(module: fx.GraphModule, node: fx.Node, region: fx.GraphModule) -> None:
    """Put the nodes of the region in its place."""
    graph = node.graph
    inner = dict(zip(region.graph.find_nodes(op="placeholder"), node.args[2:], strict=True))
    with graph.inserting_before(node):
        for source in region.graph.nodes:
            if source.op in ("placeholder", "output"):
                continue
            copy = graph.node_copy(source, lambda x: inner[x])
            if source.op in ("get_attr", "call_module"):
                copy.target = _adopt(module, region, source.target)
            inner[source] = copy
        results = fx.map_arg(region.graph.output_node().args[0], lambda x: inner[x])
    for user in list(node.users):
        assert user.target is operator.getitem, user.format_node()
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def _adopt(module: fx.GraphModule, region: fx.GraphModule, target: str) -> str:
    value = operator.attrgetter(target)(region)
    name = f"{target}_of_block".replace(".", "_")
    while hasattr(module, name) and getattr(module, name) is not value:
        name += "_"
    setattr(module, name, value)
    return name


def _is_static(x: Tensor) -> bool:
    return all(isinstance(size, int) for size in (*x.shape, *x.stride()))


def _block_name(region: fx.GraphModule) -> str:
    """Class of the module that the region runs: the first on the stack that is an item of a list."""
    for node in region.graph.nodes:
        for path, kind in node.meta.get("nn_module_stack", {}).values():
            if path.rpartition(".")[2].isdigit():
                return str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    return "Block"


def _modes(device_types: set[str]) -> tuple:
    autocast = tuple(
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        for device in sorted(device_types)
    )
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)
