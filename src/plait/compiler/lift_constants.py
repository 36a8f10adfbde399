"""Layers that differ in a number only become calls of one template, with the number as an argument.

GPT-2 may scale the attention of layer i by 1/(i+1), for example. Each such layer was traced by
itself, so a number that changes the operators (a probability of zero, say) keeps its own template.
"""

# pyright: basic
# (fx nodes are not typed.)

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import fx
from torch.fx.node import map_aggregate, map_arg

from plait.compiler.rewrite import part_again, pass_saved
from plait.graph.graph import (
    FORWARD,
    Graph,
    Module,
    Node,
    Role,
    Template,
    call_of,
    describe,
    module_of,
)

# fx types them for what an argument may be, not for what is mapped here.
_map_all: Any = map_aggregate
_map_nodes: Any = map_arg


def lift_constants(graph: Graph) -> Graph:
    """Merge templates that are equal but for numbers."""
    groups: dict[tuple, list[tuple[Template, list[float]]]] = {}
    for template in graph.templates.values():
        text, numbers = _text(template.joint or template.forward)
        key = (
            template.block,
            template.arguments,
            _tangent_strides(template),
            template.threaded,
            template.differentiable,
            text,
        )
        groups.setdefault(key, []).append((template, numbers))
    merged: dict[str, tuple[Template, list[float]]] = {}
    for group in groups.values():
        varying = [
            i
            for i, given in enumerate(zip(*(n for _, n in group), strict=True))
            if len(set(map(repr, given))) > 1
        ]
        if len(group) > 1:
            common = _with_arguments(group[0][0], varying)
            for template, numbers in group:
                merged[template.name] = (common, [numbers[i] for i in varying])
    return _call_merged(graph, merged) if merged else graph


def _tangent_strides(template: Template) -> tuple[tuple[int, ...], ...]:
    """How the gradients lie that arrive: where one is expanded, other layouts follow from it."""
    if template.joint is None:
        return ()
    tangents = template.joint.graph.find_nodes(op="placeholder")[len(template.arguments) :]
    return tuple(node.meta["val"].stride() for node in tangents)


def _call_merged(graph: Graph, merged: dict[str, tuple[Template, list[float]]]) -> Graph:
    graph = graph.copy()
    for node in graph.root.graph.nodes:
        found = call_of(node)
        if found is None or found[0] not in merged:
            continue
        template, numbers = merged[found[0]]
        added = numbers if found[1] == FORWARD else ()
        node.args = (template.name, found[1], *node.args[2:], *added)
    for name, (template, _) in merged.items():
        del graph.templates[name]
        graph.templates[template.name] = template
    pass_saved(graph)
    return graph


def _with_arguments(template: Template, varying: Sequence[int]) -> Template:
    """The template with the numbers at these positions as further arguments."""
    joint = template.joint or template.forward
    num_arguments = len(template.arguments)
    graph = fx.Graph()
    copies: dict[Node, Node] = {}
    placeholders = joint.graph.find_nodes(op="placeholder")
    for node in placeholders[:num_arguments]:
        copies[node] = graph.node_copy(node)
    lifted = {}
    for i in varying:
        lifted[i] = graph.placeholder(f"number_{i}")
        lifted[i].meta["val"] = 0.0
    position = -1

    def number(x: object) -> object:
        nonlocal position
        if type(x) is not float:
            return x
        position += 1
        return lifted.get(position, x)

    for node in joint.graph.nodes:
        if node in copies or node.op == "output":
            continue
        copy = copies[node] = graph.node_copy(node, lambda x: copies[x])
        copy.args, copy.kwargs = _map_all((copy.args, copy.kwargs), number)
    results = _map_nodes(joint.graph.output_node().args[0], lambda x: copies[x])
    graph.output((*results, *(None for _ in varying)) if template.joint else results)
    module = module_of(joint, graph)
    numbers = tuple(describe(Role.INPUT, str(num_arguments + i), 0.0) for i in range(len(varying)))
    common = replace(template, name=f"{template.name}_lifted", forward=module)
    common.arguments = template.arguments + numbers
    if template.joint is not None:
        part_again(common, module)
        common.gradients = template.gradients + (None,) * len(varying)
    return common


def _text(module: Module) -> tuple[str, list[float]]:
    """The graph with its own numbering and without its floats, and those floats in order."""
    names = {node: f"%{i}" for i, node in enumerate(module.graph.nodes)}
    numbers: list[float] = []

    def blank(x: object) -> object:
        if type(x) is float:
            numbers.append(x)
            return "number"
        return x

    lines = []
    for node in module.graph.nodes:
        args = _map_all((node.args, node.kwargs), blank)
        lines.append(f"{node.op} {node.target} {_map_nodes(args, names.__getitem__)}")
    return "\n".join(lines), numbers
