"""Regions parted behind their attentions, so that pieces can end there.

A deep model is one region called many times. Where pieces span from one attention to the next
(`cut.py`), each call becomes calls of the parts of its region, which are made once: to write out
the operators of every layer takes longer than most passes.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch._higher_order_ops.invoke_subgraph import invoke_subgraph

from plait.graph.graph import Module, Node, module_of
from plait.graph.inline import calls_of_regions, inline_region

ENDS = "ends"
"""Metadata of a call whose last operator is one behind which pieces may end."""


@dataclass(frozen=True)
class _Part:
    """A part of a region: its name in the module, and what it takes and gives, as region nodes."""

    name: str
    operands: list[Node]
    results: list[Node]
    ends: bool


def split_regions(
    module: Module, ends: Callable[[Node], bool], changes_mode: Callable[[Node], bool]
) -> None:
    """Part every region behind each node that `ends` names, in place.

    A region that changes modes or holds tensors, and a call with a number or with the same tensor
    twice, is put back where it was instead.
    """
    splitter = _Splitter(module, ends, changes_mode)
    for node in calls_of_regions(module):
        parts = splitter.parts_of(node.args[0].target)
        operands = node.args[2:]
        is_plain = all(isinstance(x, fx.Node) and _is_tensor(x) for x in operands)
        if parts is None or not is_plain or len(set(operands)) < len(operands):
            inline_region(module, node)
        else:
            splitter.call_parts(node, parts)


class _Splitter:
    def __init__(
        self, module: Module, ends: Callable[[Node], bool], changes_mode: Callable[[Node], bool]
    ) -> None:
        self.module, self.ends, self.changes_mode = module, ends, changes_mode
        self.parts: dict[str, list[_Part] | None] = {}
        self.names: dict[str, str] = {}  # of parts, by what they compute

    def parts_of(self, name: str) -> list[_Part] | None:
        """The parts of a region; None if it cannot be parted."""
        if name not in self.parts:
            self.parts[name] = self.parted(getattr(self.module, name))
        return self.parts[name]

    def parted(self, region: Module) -> list[_Part] | None:
        outputs = region.graph.output_node().args[0]
        holds_tensors = any(
            isinstance(operator.attrgetter(node.target)(region), Tensor)
            for node in region.graph.find_nodes(op="get_attr")
        )
        if (
            holds_tensors
            or not all(isinstance(x, fx.Node) and x.op == "call_function" for x in outputs)
            or any(self.changes_mode(node) for node in region.graph.nodes)
        ):
            return None
        groups = self.groups(region)
        at = {node: i for i, group in enumerate(groups) for node in group}
        wanted = set(outputs)
        parts = []
        for i, group in enumerate(groups):
            sources = dict.fromkeys(x for node in group for x in node.all_input_nodes)
            operands = [x for x in sources if x.op != "get_attr" and at.get(x) != i]
            results = [
                node
                for node in group
                if node in wanted or any(at.get(u, i) != i for u in node.users)
            ]
            name = self.name_of(region, group, operands, results)
            parts.append(_Part(name, operands, results, any(map(self.ends, group))))
        return parts

    def groups(self, region: Module) -> list[list[Node]]:
        """The operators from one end to the next; parts of a tuple stand where it is made."""
        groups: list[list[Node]] = [[]]
        at: dict[Node, int] = {}
        for node in region.graph.nodes:
            if node.op in ("placeholder", "output", "get_attr"):
                continue
            is_part = node.target is operator.getitem and not _is_tensor(node.args[0])
            at[node] = at.get(node.args[0], len(groups) - 1) if is_part else len(groups) - 1
            groups[at[node]].append(node)
            if self.ends(node):
                groups.append([])
        return [group for group in groups if group]

    def name_of(
        self, region: Module, nodes: list[Node], operands: list[Node], results: list[Node]
    ) -> str:
        """Put the part into the module, if there is none like it yet."""
        text = text_of(nodes, operands, results, region)
        if text not in self.names:
            name = f"part_of_region_{len(self.names)}"
            setattr(self.module, name, extract_nodes(region, nodes, operands, results))
            self.names[text] = name
        return self.names[text]

    def call_parts(self, node: Node, parts: list[_Part]) -> None:
        """Call the parts one after the other in the place of a region."""
        region = getattr(self.module, node.args[0].target)
        graph = node.graph
        inner = dict(zip(region.graph.find_nodes(op="placeholder"), node.args[2:], strict=True))
        with graph.inserting_before(node):
            for part in parts:
                attribute = graph.get_attr(part.name)
                operands = (inner[x] for x in part.operands)
                called = graph.call_function(invoke_subgraph, (attribute, part.name, *operands))
                called.meta = {
                    "example_value": tuple(x.meta["example_value"] for x in part.results),
                    ENDS: part.ends,
                }
                for i, result in enumerate(part.results):
                    inner[result] = graph.call_function(operator.getitem, (called, i))
                    inner[result].meta = dict(result.meta)
        outputs = region.graph.output_node().args[0]
        for user in list(node.users):
            new = inner[outputs[user.args[1]]]
            new.meta["example_value"] = user.meta["example_value"]
            user.replace_all_uses_with(new)
            graph.erase_node(user)
        graph.erase_node(node)


def extract_nodes(
    module: Module, nodes: Sequence[Node], operands: Sequence[Node], results: Sequence[Node]
) -> Module:
    """Nodes of a module as a module of their own, with the objects that they use."""
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


def text_of(
    nodes: Sequence[Node],
    operands: Sequence[Node],
    results: Sequence[Node],
    owner: Module | None = None,
) -> str:
    """Code with its own numbering, so that equal pieces read the same.

    owner: of nodes of several modules, that whose objects they use.
    """
    numbers = {node: i for i, node in enumerate((*operands, *nodes))}

    def number(node: Node) -> Any:
        if node in numbers:
            return f"%{numbers[node]}"
        # What is not of the piece is a module or DTensor's mesh, known by its name.
        known = "" if owner is None else f"#{id(operator.attrgetter(node.target)(owner))}"
        return f"@{node.target}{known}"

    lines = [f"{len(operands)} operands, results {[numbers[node] for node in results]}"]
    for node in nodes:
        args = fx.map_arg((node.args, node.kwargs), number)
        target = node.target
        name = getattr(target, "__qualname__", None) or str(target)
        unique = f"{getattr(target, '__module__', '')}.{name}#{id(target)}"
        lines.append(f"{node.op} {unique if callable(target) else target} {args}")
    return "\n".join(lines)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)
