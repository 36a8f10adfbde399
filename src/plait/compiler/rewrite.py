"""What every pass does that rewrites the joint graphs of templates.

A rewritten joint graph is parted into forward and backward again, and then saves other values than
before: the backward calls in the root take these. New nodes get their form from a run on fake
tensors and their origin from the node that they stand for.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Callable, Collection
from typing import Any

from torch import fx

from plait.graph.graph import (
    BACKWARD,
    FORWARD,
    Graph,
    Module,
    Node,
    Role,
    Template,
    call_of,
    copied,
)
from plait.graph.partition import part_joint


def rewrite_joints(graph: Graph, rewrite: Callable[[Module], bool]) -> Graph:
    """Rewrite the joint graph of each kind of piece; `rewrite` changes it in place, or says no.

    If nothing changes, the graph itself is returned: a deep graph takes long to copy.
    """
    rewritten: dict[str, Module] = {}
    for name, template in graph.templates.items():
        joint = copied(template.joint or template.forward)
        if rewrite(joint):
            rewritten[name] = joint
    if not rewritten:
        return graph
    graph = graph.copy()
    for name, joint in rewritten.items():
        template = graph.templates[name]
        if template.joint is None:
            template.forward = joint
        else:
            part_again(template, joint)
    pass_saved(graph)
    return graph


def part_again(
    template: Template, joint: Module | None = None, *, recompute: Collection[str] = ()
) -> None:
    """Part a template's joint graph, rewritten or given, in place; without gradients nothing is.

    recompute: names of forward nodes that the backward computes again.
    """
    joint = joint or template.joint
    if joint is None:
        return
    parts = part_joint(
        joint,
        num_arguments=len(template.arguments),
        num_results=len(template.results),
        recompute=recompute,
    )
    template.joint, template.forward, template.backward = joint, parts.forward, parts.backward
    template.saved = parts.saved


def pass_saved(graph: Graph) -> None:
    """Let each backward call take what its template saves now, in place."""
    for node in list(graph.root.graph.nodes):
        called = call_of(node)
        if called is not None and called[1] == BACKWARD:
            _pass_saved(node, graph.templates[called[0]])
    for node in reversed(list(graph.root.graph.nodes)):
        if node.target is operator.getitem and not node.users:
            graph.root.graph.erase_node(node)
    graph.root.recompile()


def _pass_saved(backward: Node, template: Template) -> None:
    forward = backward.meta["forward"]
    num_tangents = len(template.differentiable) + len(template.threaded)
    tangents = backward.args[len(backward.args) - num_tangents :]
    position = len(template.results)
    saved = []
    graph = backward.graph
    for value in template.saved:
        if value.role is Role.INPUT:
            saved.append(forward.args[2 + int(value.name)])
            continue
        with graph.inserting_after(forward):
            part = graph.call_function(operator.getitem, (forward, position))
        part.meta["val"] = value
        saved.append(part)
        position += 1
    backward.args = (template.name, BACKWARD, *saved, *tangents)
    assert call_of(forward) == (template.name, FORWARD)


def new_node(like: Node, target: Any, args: tuple, kwargs: dict | None = None) -> Node:
    """Make a node where the graph inserts now, with the origin of another."""
    node = like.graph.call_function(target, args, kwargs)
    node.meta = {key: value for key, value in like.meta.items() if key != "val"}
    given: Any = fx.map_arg((args, kwargs or {}), lambda x: x.meta["val"])
    known = like.meta["val"]
    first = known[0] if isinstance(known, tuple | list) else known
    with first.fake_mode:
        node.meta["val"] = target(*given[0], **given[1])
    return node
