"""What must hold after islands were put in: nothing passed a collective, and nothing was lost."""

# pyright: basic
# (fx nodes are not typed.)

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch.fx.node import map_arg as _map_arg

from plait.compiler.group import ends_segment
from plait.graph.graph import Module, Node
from plait.graph.island import Island, expanded, looks_only
from plait.graph.verify_nodes import fail

# fx types it for what an argument may be, not for what is mapped here.
map_arg: Any = _map_arg
_ORDER = "islands leave every collective, wait, draw and write in its place"
_SEGMENT = "no operator moves from one side of a collective to the other"
_RESTS = "a collective rests on the operators on which it rested, and on no other"
_SAME = "islands hold the operators that were there"


def verify_fused(before: Module, after: Module, islands: Mapping[str, Island]) -> None:
    """Compare a module with what became of it. Raises GraphError at the first broken rule.

    Operators are compared by what they compute, with every island's operators in its place: the
    same ones lie between two collectives, and each collective rests on the same ones. So a
    collective can be launched no later than before but for the time of its own island.
    """
    were, are = _Trace(before), _Trace(expanded(after, islands))
    if were.fixed != are.fixed:
        fail("the module with islands", "collectives", _ORDER, f"{are.fixed}, not {were.fixed}")
    is_whole = sum(were.segments, Counter()) == sum(are.segments, Counter())
    for i, (old, new) in enumerate(zip(were.segments, are.segments, strict=True)):
        if old != new:
            found = f"segment {i} lacks {len(old - new)} operators, and has {len(new - old)} more"
            fail("the module with islands", "segments", _SEGMENT if is_whole else _SAME, found)
    if were.rests != are.rests:
        fail("the module with islands", "collectives", _RESTS, "they rest on others")
    if were.outputs != are.outputs:
        fail("the module with islands", "outputs", _SAME, "they are computed otherwise")


class _Trace:
    """A module by content: each value is known by its operator and by what it was computed of."""

    def __init__(self, module: Module) -> None:
        self.behind: dict[Node, frozenset[int]] = {}
        self.fixed: list[str] = []
        self.rests: list[frozenset[int]] = []
        self.segments: list[Counter[str]] = [Counter()]
        self.contents: dict[Node, str] = {}
        for node in module.graph.nodes:
            self._add(node)
        (outputs,) = module.graph.output_node().args
        self.outputs = [self.contents.get(x) for x in outputs]

    def _add(self, node: Node) -> None:
        if node.op == "output":
            return
        self.contents[node] = self._content(node)
        behind = [self.behind[x] for x in node.all_input_nodes]
        if node.op != "call_function":
            self.behind[node] = frozenset()
            return
        if ends_segment(node):
            self.behind[node] = frozenset().union(*behind, {len(self.fixed)})
            self.fixed.append(self.contents[node])
            self.rests.append(frozenset().union(*behind))
            self.segments.append(Counter())
            return
        self.behind[node] = frozenset().union(*behind)
        if not looks_only(node):
            self.segments[-1][self.contents[node]] += 1

    def _content(self, node: Node) -> str:
        if node.op == "placeholder":
            return f"input {node.name}"
        if node.op == "get_attr":
            return f"attribute {node.target}"
        args, kwargs = map_arg((node.args, node.kwargs), lambda x: _Known(self.contents[x]))
        # The text is hashed, or it would double at each operator.
        return f"{node.target}:{hash((node.target, repr(args), repr(kwargs))):x}"


class _Known:
    """The content of an operand, in a repr."""

    def __init__(self, content: str) -> None:
        self.content = content

    def __repr__(self) -> str:
        return f"<{self.content}>"
