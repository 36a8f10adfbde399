"""Which neighbouring operators form one island.

Each operator gets a level: how many operators that cannot be fused lie before it, on the longest
way. Operators of one level never wait for each other through something outside, so any of them may
run as one. A collective, a wait, a random draw and a write into memory end a segment: levels start
anew behind them, so that no operator passes one and islands never reach across.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.fx.node import map_arg

from plait.compiler.fusible import is_fusible, writes
from plait.cost.operations import Cost, cost_of
from plait.graph.collectives import is_collective, is_wait
from plait.graph.graph import Module, Node
from plait.graph.island import is_computing, looks_only, root_of
from plait.graph.random_nodes import is_random
from plait.graph.schedule import name_of

Groups = list[list[Node]]


def ends_segment(node: Node) -> bool:
    """Whether nothing may be moved from one side of the node to the other."""
    return is_collective(node) or is_wait(node) or is_random(node) or writes(node)


def group(module: Module) -> Groups:
    """The islands of a module, each with its operators in order; views are not among them."""
    nodes = [n for n in module.graph.nodes if n.op == "call_function" and not looks_only(n)]
    fusible = {node for node in nodes if is_fusible(node)}
    levels = _levels(nodes, fusible)
    _sink(nodes, fusible, levels)
    at_level: dict[int, list[Node]] = defaultdict(list)
    for node in nodes:
        if node in fusible:
            at_level[levels[node]].append(node)
    found = [part for level in sorted(at_level) for part in _connected(at_level[level])]
    return [part for part in found if sum(map(is_computing, part)) > 1 and _takes_tensors(part)]


def sources(node: Node) -> list[Node]:
    """What the node needs, seen through views, each once."""
    return list(dict.fromkeys(root_of(x) for x in node.all_input_nodes))


def _levels(nodes: Sequence[Node], fusible: set[Node]) -> dict[Node, int]:
    levels: dict[Node, int] = {}
    base = highest = 0
    for node in nodes:
        level = max((levels.get(x, 0) for x in sources(node)), default=0)
        is_own_step = node not in fusible and node.target is not operator.getitem
        level = max(base, level + is_own_step)
        if ends_segment(node):
            level = base = highest + 1
        levels[node] = level
        highest = max(highest, level)
    return levels


def _sink(nodes: Sequence[Node], fusible: set[Node], levels: dict[Node, int]) -> None:
    """Let an operator run with its users, where what it makes is larger than what it takes."""
    barriers = sorted(levels[node] for node in nodes if ends_segment(node))
    for node in reversed(nodes):
        if node not in fusible or not isinstance(node.meta["val"], Tensor):
            continue
        if node.target is operator.getitem:
            continue  # it stays with the operator that it is a part of
        users = list(_users(node))
        if not users or any(user.op == "output" for user in users):
            continue
        bound = min(levels[user] - (user not in fusible) for user in users)
        limit = next((barrier - 1 for barrier in barriers if barrier > levels[node]), bound)
        makes, takes = num_bytes([node]), num_bytes(sources(node))
        if bound > levels[node] and bound <= limit and makes >= takes:
            levels[node] = bound


def _users(node: Node) -> Iterable[Node]:
    """Who needs the node, seen through views."""
    for user in node.users:
        if looks_only(user):
            yield from _users(user)
        else:
            yield user


def _connected(members: Sequence[Node]) -> Groups:
    """Parts of a level that have something to share: a value of one, or an operand."""
    leader = {node: node for node in members}

    def find(node: Node) -> Node:
        while leader[node] is not node:
            node = leader[node]
        return node

    readers: dict[Node, Node] = {}
    for node in members:
        for source in sources(node):
            other = source if source in leader else readers.setdefault(source, node)
            leader[find(node)] = find(other)
    parts: dict[Node, list[Node]] = defaultdict(list)
    for node in members:
        parts[find(node)].append(node)
    return list(parts.values())


def _takes_tensors(members: Sequence[Node]) -> bool:
    inside = set(members)
    return any(source not in inside for node in members for source in sources(node))


def cost_of_node(node: Node) -> Cost | None:
    """What an operator does, from the forms of its operands; None of what is none."""
    name = name_of(node.target)
    if name is None:
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda x: x.meta.get("val"))  # type: ignore[misc]
    return cost_of(name, args, kwargs, node.meta["val"])


def num_bytes(nodes: Iterable[Node]) -> int:
    """Size of what the nodes make."""
    found = 0
    for node in nodes:
        value = node.meta.get("val")
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, Tensor):
                found += x.numel() * x.element_size()
    return found
