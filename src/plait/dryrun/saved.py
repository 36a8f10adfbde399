"""What the programs of a template hold in memory: saved for the backward, and live at the peak.

Bytes of distinct memory: views count for what they look at, parameters and what other layers share
not at all.
"""

# pyright: basic
# (fx nodes are not typed.)

from collections.abc import Collection
from dataclasses import dataclass

from plait.dryrun.work import num_bytes_of
from plait.graph.graph import Module, Node, Role, Template, Value
from plait.graph.partition import is_view
from plait.graph.source import source_of


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor that lives on. source: the user's line that made it."""

    num_bytes: int
    name: str
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one call of a template; saved: each tensor of the saved bytes.

    The peaks leave out what has the shape of all experts' matrices, of which a rank of ep has a
    share: at most expert_peak_bytes of them live at once.
    """

    saved_bytes: int
    forward_peak_bytes: int
    backward_peak_bytes: int
    expert_peak_bytes: int = 0
    saved: tuple[Tensor, ...] = ()


def held_of(
    template: Template, own: Collection[int], experts: Collection[tuple[int, ...]] = ()
) -> Held:
    """What a call holds. own: numbers of arguments that it alone takes and that are no parameters.

    experts: shapes of the parameters that hold a matrix for each expert.

    Saved is what the forward makes for the backward, and those of its own arguments that take a
    gradient (a layer's input). The peaks come on top of it.
    """
    if template.backward is None:
        peak, of_experts = _peaks(template.forward, (), experts)
        return Held(
            saved_bytes=0,
            forward_peak_bytes=peak,
            backward_peak_bytes=0,
            expert_peak_bytes=of_experts,
        )
    bases = _saved_bases(template)
    inputs = saved_inputs(template, own)
    saved = [
        *(Tensor(num_bytes=num_bytes_of(x), name=x.name, source=source_of(x)) for x in bases),
        *(Tensor(num_bytes=x.num_bytes, name="input of the layer") for x in inputs),
    ]
    forward, forward_experts = _peaks(template.forward, bases, experts)
    backward, backward_experts = _peaks(template.backward, (), experts)
    return Held(
        saved_bytes=sum(each.num_bytes for each in saved),
        saved=tuple(sorted(saved, key=lambda each: (-each.num_bytes, each.name))),
        forward_peak_bytes=forward,
        backward_peak_bytes=backward,
        expert_peak_bytes=max(forward_experts, backward_experts),
    )


def saved_inputs(template: Template, own: Collection[int]) -> list[Value]:
    """Those of its own arguments that take a gradient and that the backward needs."""
    return [
        value
        for value in template.saved
        if value.role is Role.INPUT
        and int(value.name) in own
        and template.gradients[int(value.name)] is not None
    ]


def _saved_bases(template: Template) -> set[Node]:
    """The memory of the forward's own that the backward needs."""
    module: Module = template.forward
    (outputs,) = module.graph.output_node().args
    saved = outputs[len(template.results) :]
    found = {base_of(node) for node in saved if hasattr(node, "op")}
    return {node for node in found if node.op == "call_function"}


def base_of(node: Node) -> Node:
    """The node whose memory a view looks at."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def _peaks(
    module: Module, apart: Collection[Node], experts: Collection[tuple[int, ...]]
) -> tuple[int, int]:
    """The most that is live, without what has the shape of experts, and of that alone."""
    if not experts:
        return _peak(module, apart), 0
    of_experts = {node for node in module.graph.nodes if has_shape_in(node, experts)}
    others = set(module.graph.nodes) - of_experts
    return _peak(module, {*apart, *of_experts}), _peak(module, {*apart, *others})


def has_shape_in(node: Node, shapes: Collection[tuple[int, ...]]) -> bool:
    """Whether a result has one of these shapes, or a transposed one."""
    value = node.meta.get("val")
    values = value if isinstance(value, tuple | list) else (value,)
    own = {tuple(sorted(map(int, x.shape))) for x in values if hasattr(x, "shape")}
    return not own.isdisjoint(tuple(sorted(shape)) for shape in shapes)


def _peak(module: Module, apart: Collection[Node]) -> int:
    """The most that is live of what a program makes, without `apart`; results live to its end."""
    nodes = list(module.graph.nodes)
    last: dict[Node, int] = {}
    for i, node in enumerate(nodes):
        for source in node.all_input_nodes:
            last[base_of(source)] = i
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
