"""What the programs of a template hold in memory: saved for the backward, and live at the peak.

Bytes of distinct memory: views count for what they look at, parameters and what other layers share
not at all.
"""

# pyright: basic
# (fx nodes are not typed.)

from collections.abc import Collection
from dataclasses import dataclass

from plait.dryrun.work import num_bytes_of
from plait.graph.graph import Module, Node, Role, Template
from plait.graph.partition import is_view


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one call of a template."""

    saved_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int


def held_of(template: Template, own: Collection[int]) -> Held:
    """What a call holds. own: numbers of arguments that it alone takes and that are no parameters.

    Saved is what the forward makes for the backward, and those of its own arguments that take a
    gradient (a layer's input). The peaks come on top of it.
    """
    if template.backward is None:
        peak = _peak(template.forward, ())
        return Held(saved_bytes=0, forward_peak_bytes=peak, backward_peak_bytes=0)
    bases = _saved_bases(template)
    inputs = [
        value
        for value in template.saved
        if value.role is Role.INPUT
        and int(value.name) in own
        and template.gradients[int(value.name)] is not None
    ]
    saved = sum(num_bytes_of(base) for base in bases)
    saved += sum(value.num_bytes for value in inputs)
    return Held(
        saved_bytes=saved,
        forward_peak_bytes=_peak(template.forward, bases),
        backward_peak_bytes=_peak(template.backward, ()),
    )


def _saved_bases(template: Template) -> set[Node]:
    """The memory of the forward's own that the backward needs."""
    module: Module = template.forward
    (outputs,) = module.graph.output_node().args
    saved = outputs[len(template.results) :]
    found = {_base(node) for node in saved if hasattr(node, "op")}
    return {node for node in found if node.op == "call_function"}


def _base(node: Node) -> Node:
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def _peak(module: Module, apart: Collection[Node]) -> int:
    """The most that is live of what a program makes, without `apart`; results live to its end."""
    nodes = list(module.graph.nodes)
    last: dict[Node, int] = {}
    for i, node in enumerate(nodes):
        for source in node.all_input_nodes:
            last[_base(source)] = i
    dies: dict[int, list[Node]] = {}
    for node, i in last.items():
        dies.setdefault(i, []).append(node)
    live = peak = 0
    alive: set[Node] = set()
    for i, node in enumerate(nodes):
        if node.op == "call_function" and not is_view(node) and node not in apart:
            alive.add(node)
            live += num_bytes_of(node)
            peak = max(peak, live)
        for dead in dies.get(i, ()):
            if dead in alive:
                alive.discard(dead)
                live -= num_bytes_of(dead)
    return peak
