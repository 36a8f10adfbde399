"""Cut the module that TorchDynamo made into pieces: its regions, and what stands between them.

Every piece becomes a template (`trace.py`), and the root graph calls them (`compose.py`). A piece
ends where a block begins and where a mode changes, so each is traced under one set of modes.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from plait.graph.graph import Module, Node
from plait.graph.inline import calls_of_regions, inline_regions
from plait.graph.modes import Modes, current_modes
from plait.graph.split_regions import ENDS, extract_nodes, split_regions, text_of
from plait.graph.trace import NotATemplate

BETWEEN = "Between"
"""Name of the pieces that stand between blocks."""

_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast
_SET_GRAD = torch._C._set_grad_enabled
_MODES = (_ENTER, _EXIT, _SET_GRAD)


@dataclass
class Piece:
    """Nodes of the module that become one template.

    key: pieces with equal keys compute the same. operands and results are nodes of the module; a
    result None is never used. goes_on: it is one template with the next (see `join.py`).
    """

    key: str
    block: str
    module: Module
    operands: list[Node]
    results: list[Node | None]
    modes: Modes
    goes_on: bool = False


def cut(module: Module, *, num_attentions: int = 0) -> list[Piece]:
    """Cut a module into pieces, in order. Raises NotATemplate if they would not be independent.

    num_attentions: cut behind each attention; a template is to span one, or two, ..., the first one
    more. 0: from block to block.
    Between two attentions each token is treated by itself, so there the work of one part of the
    tokens can hide the communication of another (where a cut lies says only what can be ordered
    together). The first piece spans one attention more: its backward is the last of all, and has
    the weight gradients of a layer to hide its last messages behind. Pieces of equal layers are
    equal, as blocks are.
    """
    checked = [module]
    if num_attentions:
        split_regions(module, _mixes_tokens, lambda node: node.target in _MODES)
        checked += _regions(module)
    for each in checked:
        for node in each.graph.nodes:
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
        self.results_of_regions: set[Node] = set()
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
        elif node.target in _MODES:
            self.finish()
            self.change_mode(node)
        elif node.target is invoke_subgraph and not self.num_attentions:
            self.finish()
            self.take_region(node)
            self.results_of_regions.update(node.users)
        elif node in self.results_of_regions:
            pass  # a result of a region: known there
        else:
            self.between.append(node)
            if self.num_attentions and (node.meta.get(ENDS) or _mixes_tokens(node)):
                self.num_seen += 1
                is_last = self.num_seen > 1 and (self.num_seen - 1) % self.num_attentions == 0
                self.finish(goes_on=not is_last)

    def change_mode(self, node: Node) -> None:
        if self.pieces:
            self.pieces[-1].goes_on = False
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

    def finish(self, *, goes_on: bool = False) -> None:
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
        key = text_of(nodes, operands, results)
        if key not in self.parts:  # a copy takes longer than the text
            part = extract_nodes(self.module, nodes, operands, results)
            inline_regions(part)
            name = block_name(part) if self.num_attentions else None
            self.parts[key] = (name or BETWEEN, part)
        name, part = self.parts[key]
        modes = current_modes()
        self.pieces.append(Piece(key, name, part, operands, list(results), modes, goes_on))

    def is_module(self, node: Node) -> bool:
        return node.op == "get_attr" and not isinstance(_attribute(self.module, node), Tensor)


def _regions(module: Module) -> list[Module]:
    names = dict.fromkeys(node.args[0].target for node in calls_of_regions(module))
    return [getattr(module, name) for name in names]


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
