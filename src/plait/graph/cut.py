"""Cut the module that TorchDynamo made into pieces: its regions, and what stands between them.

Every piece becomes a template (`trace.py`), and the root graph calls them (`compose.py`). A piece
ends where a block begins and where a mode changes, so each is traced under one set of modes.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from plait.graph.graph import Module, Node, module_of
from plait.graph.inline import inline_regions
from plait.graph.modes import Modes, current_modes
from plait.graph.trace import NotATemplate

BETWEEN = "Between"
"""Name of the pieces that stand between blocks."""

_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast
_SET_GRAD = torch._C._set_grad_enabled


@dataclass
class Piece:
    """Nodes of the module that become one template.

    key: pieces with equal keys compute the same. operands and results are nodes of the module; a
    result None is never used.
    """

    key: str
    block: str
    module: Module
    operands: list[Node]
    results: list[Node | None]
    modes: Modes


def cut(module: Module, *, num_attentions: int = 0) -> list[Piece]:
    """Cut a module into pieces, in order. Raises NotATemplate if they would not be independent.

    num_attentions: cut behind each attention, or each second one, ..., the first left out; 0: from
    block to block.
    Between two attentions each token is treated by itself, so there the work of one part of the
    tokens can hide the communication of another (where a cut lies says only what can be ordered
    together). The first piece spans one attention more: its backward is the last of all, and has
    the weight gradients of a layer to hide its last messages behind. Pieces of equal layers are
    equal, as blocks are.
    """
    if num_attentions:
        inline_regions(module)
    for node in module.graph.nodes:
        _check(node)
    return _Cutter(module, num_attentions).run()


class _Cutter:
    def __init__(self, module: Module, num_attentions: int) -> None:
        self.module = module
        self.num_attentions = num_attentions
        self.num_seen = 0
        self.pieces: list[Piece] = []
        self.between: list[Node] = []
        self.inside: set[Node] = set()  # nodes of finished pieces between blocks
        self.exits: dict[Node, torch.autocast] = {}
        self.parts: dict[str, tuple[str, Module]] = {}  # name and module, by key

    def run(self) -> list[Piece]:
        grad = torch.is_grad_enabled()
        try:
            for node in self.module.graph.nodes:
                self.take(node)
            self.finish()
        finally:
            for context in reversed(self.exits.values()):
                context.__exit__(None, None, None)
            torch._C._set_grad_enabled(grad)
        return self.pieces

    def take(self, node: Node) -> None:
        if node.op in ("placeholder", "output"):
            return
        if node.op == "get_attr":
            if not isinstance(_attribute(self.module, node), Tensor | fx.GraphModule | DeviceMesh):
                raise NotATemplate(f"it uses the object {node.target}")
        elif node.target in (_ENTER, _EXIT, _SET_GRAD):
            self.finish()
            self.change_mode(node)
        elif node.target is invoke_subgraph:
            self.finish()
            self.take_region(node)
        elif node.target is operator.getitem and node.args[0].target is invoke_subgraph:
            pass  # a result of a region: known there
        else:
            self.between.append(node)
            if self.num_attentions and _mixes_tokens(node):
                self.num_seen += 1
                if self.num_seen > 1 and (self.num_seen - 1) % self.num_attentions == 0:
                    self.finish()

    def change_mode(self, node: Node) -> None:
        if node.target is _ENTER:
            self.exits[node] = _ENTER(*node.args)
        elif node.target is _EXIT:
            _EXIT(self.exits.pop(node.args[0]))
        else:
            _SET_GRAD(*node.args)

    def take_region(self, node: Node) -> None:
        region = getattr(self.module, node.args[0].target)
        results: list[Node | None] = [None] * len(node.meta["example_value"])
        for user in list(node.users):
            if user.target is not operator.getitem:
                raise NotATemplate("a region is used as a whole")
            first = results[user.args[1]]
            if first is None:
                results[user.args[1]] = user
            else:
                user.replace_all_uses_with(first)
        operands = list(node.args[2:])
        if not all(isinstance(x, fx.Node) for x in operands):
            raise NotATemplate("a block takes a number that is not the same each time")
        if len(set(operands)) < len(operands):
            raise NotATemplate("a block takes the same tensor twice")
        name = block_name(region) or "Block"
        self.pieces.append(
            Piece(node.args[0].target, name, region, operands, results, current_modes())
        )

    def finish(self) -> None:
        """End the piece of nodes between blocks."""
        nodes, self.between = self.between, []
        if not nodes:
            return
        # Parts of a tuple stand where the tuple is made.
        nodes += [
            user
            for node in nodes
            if not isinstance(node.meta.get("example_value"), Tensor)
            for user in node.users
            if user.target is operator.getitem and user not in nodes and user not in self.inside
        ]
        nodes = [node for node in nodes if node not in self.inside]
        self.inside.update(nodes)
        own = set(nodes)
        operands = [
            source
            for source in dict.fromkeys(s for node in nodes for s in node.all_input_nodes)
            if source not in own and not self.is_module(source)
        ]
        results = [
            node
            for node in nodes
            if any(u not in own and u.target is not _EXIT for u in node.users)
        ]
        for node in (*operands, *results):
            value = node.meta.get("example_value")
            if isinstance(value, DTensor):
                raise NotATemplate("a DTensor passes between blocks")
            if not isinstance(value, Tensor) and node.op != "get_attr":
                raise NotATemplate("something that is not a tensor passes between blocks")
        key = _text(nodes, operands, results)
        if key not in self.parts:  # a copy takes longer than the text
            part = _extract(self.module, nodes, operands, results)
            name = block_name(part) if self.num_attentions else None
            self.parts[key] = (name or BETWEEN, part)
        self.pieces.append(Piece(key, *self.parts[key], operands, list(results), current_modes()))

    def is_module(self, node: Node) -> bool:
        return node.op == "get_attr" and not isinstance(_attribute(self.module, node), Tensor)


def _check(node: Node) -> None:
    value = node.meta.get("example_value")
    values = value if isinstance(value, tuple | list) else [value]
    for each in values:
        if isinstance(each, torch.SymInt | torch.SymFloat | torch.SymBool):
            raise NotATemplate("its shapes are dynamic")
        if isinstance(each, Tensor):
            if is_traceable_wrapper_subclass(each) and not isinstance(each, DTensor):
                raise NotATemplate(f"it computes with {type(each).__name__}")
            if not all(isinstance(size, int) for size in (*each.shape, *each.stride())):
                raise NotATemplate("its shapes are dynamic")


def _extract(
    module: Module,
    nodes: Sequence[Node],
    operands: Sequence[Node],
    results: Sequence[Node],
) -> Module:
    graph = fx.Graph()
    copies = {}
    for i, node in enumerate(operands):
        copies[node] = graph.placeholder(f"operand_{i}")
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in copies and source.op == "get_attr":
                copies[source] = graph.node_copy(source)
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[node] for node in results))
    return module_of(module, graph)


def _text(nodes: Sequence[Node], operands: Sequence[Node], results: Sequence[Node]) -> str:
    """The piece's code with its own numbering, so that equal pieces read the same."""
    numbers = {node: i for i, node in enumerate((*operands, *nodes))}

    def number(node: Node) -> Any:
        # What is not of the piece is a module or DTensor's mesh, known by its name.
        return f"%{numbers[node]}" if node in numbers else f"@{node.target}"

    lines = [f"{len(operands)} operands, results {[numbers[node] for node in results]}"]
    for node in nodes:
        args = fx.map_arg((node.args, node.kwargs), number)
        target = node.target
        name = getattr(target, "__qualname__", None) or str(target)
        unique = f"{getattr(target, '__module__', '')}.{name}#{id(target)}"
        lines.append(f"{node.op} {unique if callable(target) else target} {args}")
    return "\n".join(lines)


def _attribute(module: Module, node: Node) -> object:
    return operator.attrgetter(node.target)(module)


def block_name(region: Module) -> str | None:
    """Class of the module that a region runs: the first on the stack that is in a list."""
    for node in region.graph.nodes:
        for path, kind in node.meta.get("nn_module_stack", {}).values():
            if path.rpartition(".")[2].isdigit():
                return str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    return None


def _mixes_tokens(node: Node) -> bool:
    """Whether it is an attention, by its name: a fused one, or the softmax of a plain one."""
    name = getattr(node.target, "__name__", None) or str(node.target)
    return "attention" in name or "softmax" in name
