"""What one program of a captured piece does: operations with their cost, messages, and their order.

A program is a module of a `Graph`, forward or backward. Its operators become `Work`: as they were
captured ("eager"), or with neighbouring pointwise operators and reductions taken as one kernel that
reads what comes in and writes what goes out ("fused"), as a compiler or hand-written kernels do.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from heapq import heappop, heappush
from typing import Literal

import torch
from torch import Tensor, fx

from plait.compiler.assemble import wholes_of
from plait.compiler.replicate_joint import PLACE, REPLICA
from plait.cost.collectives import Collective, collective_of
from plait.cost.operations import FREE, Cost, Kind, cost_of
from plait.errors import GraphError
from plait.graph.collectives import group_of, is_collective, is_wait
from plait.graph.graph import Module, Node
from plait.graph.partition import is_view
from plait.graph.schedule import name_of

Kernels = Literal["fused", "eager"]
Attention = Literal["fused", "unfused", "recomputed"]
"""One kernel; products and passes over the square of scores; these again in the backward."""


class Part(Enum):
    """What a model's layers are priced by."""

    PLAIN = "plain"
    ATTENTION = "attention"
    EXPERTS = "experts"


@dataclass(frozen=True, kw_only=True)
class Work:
    """One operation. depends_on: positions in the program. num_bytes: of a message.

    is_weight_only: only gradients of parameters rest on it. part: attention and experts, whose cost
    depends on cp and ep, and sums of gradients of experts. key_bytes: of attention's keys and
    values. expert_bytes: of the matrices of all experts, read or written. kernels: what it really
    is, where that is not one kernel with this cost. score_bytes: what attention that is not fused
    keeps of its scores. operator: its name, "" of several taken as one. unknown: its name, where
    it has no cost but its bytes. replica:
    for which it works, None: for all; place: where its original stood.
    """

    name: str
    cost: Cost
    depends_on: tuple[int, ...]
    collective: Collective | None = None
    group: str = ""
    num_bytes: int = 0
    is_wait: bool = False
    is_weight_only: bool = False
    part: Part = Part.PLAIN
    key_bytes: int = 0
    expert_bytes: int = 0
    kernels: tuple[Cost, ...] = ()
    score_bytes: int = 0
    operator: str = ""
    unknown: str = ""
    replica: int | None = None
    place: float = 0.0


def work_of(
    module: Module,
    kernels: Kernels,
    fillers: Iterable[Node] = (),
    attention: Attention = "fused",
) -> tuple[Work, ...]:
    """The operations of a module in an order that can be launched.

    fillers: nodes on which only gradients of parameters rest. Raises GraphError for a shape that
    depends on data.
    """
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    for node in nodes:
        _check_shapes(node)
    # Replicas write their parts where the whole will be; who reads it waits for all of them.
    wholes = wholes_of(module.graph)
    costs = {node: _cost(node) for node in nodes if not (_is_free(node) or node in wholes)}
    groups = _fused(nodes, costs) if kernels == "fused" else [[node] for node in costs]
    work = _in_order(groups, costs, set(fillers))
    if attention == "fused":
        return work
    by_name = {node.name: node for node in nodes}
    return tuple(
        _unfused(each, by_name[each.name], attention) if each.part is Part.ATTENTION else each
        for each in work
    )


def _cost(node: Node) -> Cost:
    if is_collective(node) or is_wait(node):
        return FREE
    name = name_of(node.target)
    if name is None or not isinstance(node.target, torch._ops.OpOverload):
        operands = sum(num_bytes_of(x) for x in node.all_input_nodes)
        return Cost(kind=Kind.MEMORY, bytes=operands + num_bytes_of(node))
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: x.meta["val"])  # type: ignore[misc]
    return cost_of(name, args, kwargs, node.meta["val"])


def _is_free(node: Node) -> bool:
    """Views, parts of results and numbers; waits stay, for streams wait there."""
    return (
        is_view(node)
        or node.target is operator.getitem
        or not (_tensors(node.meta.get("val")) or isinstance(node.target, torch._ops.OpOverload))
    )


_KNOWN_NAMESPACES = ("aten", "plait", "prims", "_c10d_functional", "c10d_functional", "c10d")


def _unknown(node: Node, cost: Cost) -> str:
    """The name of an operator that nobody gave a cost, or ""."""
    name = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""
    if cost.kind is not Kind.MEMORY or name.partition(".")[0] in _KNOWN_NAMESPACES:
        return ""
    return name.removesuffix(".default") or getattr(node.target, "__name__", str(node.target))


def _check_shapes(node: Node) -> None:
    for value in _tensors(node.meta.get("val")):
        for size in value.shape:
            if not isinstance(size, int) and not str(size).isdigit():
                raise GraphError(
                    f"{node.target} makes a tensor of a size that depends on data: "
                    f"{tuple(value.shape)}. The dry run cannot know it; bound it, for example by "
                    "padding to a capacity, or by sorting rows and keeping group ends as a tensor."
                )


_REDUCTIONS = frozenset(
    f"aten.{name}"
    for name in (
        "mean",
        "sum",
        "amax",
        "var_mean",
        "_softmax",
        "_softmax_backward_data",
        "_log_softmax",
        "native_layer_norm",
        "native_layer_norm_backward",
        "_fused_rms_norm",
        "_fused_rms_norm_backward",
        "cat",
        "clone",
        "_to_copy",
        "slice_backward",
        "native_dropout",
        "native_dropout_backward",
        "full",
        "zeros_like",
        "arange",
    )
)
"""What a fused kernel can hold besides pointwise operators."""


def _can_fuse(node: Node, costs: dict[Node, Cost]) -> bool:
    cost = costs.get(node)
    if cost is None or cost.kind is not Kind.MEMORY:
        return False
    tags = getattr(node.target, "tags", ())
    packet = str(node.target).rpartition(".")[0]
    return torch.Tag.pointwise in tags or packet in _REDUCTIONS


def _fused(nodes: list[Node], costs: dict[Node, Cost]) -> list[list[Node]]:
    """Connected nodes that can be fused, where nothing else stands between them.

    Replicas stay apart, so that one need not wait for another's messages. A node's level counts the
    other operators behind it, so that no group waits for itself.
    """
    level: dict[Node, int] = {}
    owner: dict[Node, list[Node]] = {}
    groups: list[list[Node]] = []
    for node in nodes:
        if node not in costs:
            continue
        sources = _sources(node, costs)
        fuses = _can_fuse(node, costs)
        behind = [
            level[x] + (not (fuses and _can_fuse(x, costs) and _alike(x, node))) for x in sources
        ]
        level[node] = max(behind, default=0)
        mine = [node]
        if fuses:
            near = [
                x
                for x in sources
                if _can_fuse(x, costs) and level[x] == level[node] and _alike(x, node)
            ]
            for group in {id(owner[x]): owner[x] for x in near}.values():
                mine = group + mine
                groups = [each for each in groups if each is not group]
        groups.append(mine)
        for each in mine:
            owner[each] = mine
    return groups


def _alike(a: Node, b: Node) -> bool:
    """Whether both work for the same replica."""
    return a.meta.get(REPLICA) == b.meta.get(REPLICA)


def _sources(node: Node, costs: dict[Node, Cost]) -> list[Node]:
    """The operations whose results the node needs, seen through views."""
    found: list[Node] = []
    for source in node.all_input_nodes:
        if source in costs:
            found.append(source)
        elif source.op == "call_function":
            found += _sources(source, costs)
    return found


def _in_order(
    groups: list[list[Node]], costs: dict[Node, Cost], fillers: set[Node]
) -> tuple[Work, ...]:
    """Each group as soon as what it needs is there, in the order of what was captured."""
    position = {node: i for i, node in enumerate(costs)}
    owner = {node: i for i, group in enumerate(groups) for node in group}
    needs = [
        {owner[x] for node in group for x in _sources(node, costs)} - {i}
        for i, group in enumerate(groups)
    ]
    users: list[list[int]] = [[] for _ in groups]
    for i, before in enumerate(needs):
        for each in before:
            users[each].append(i)
    waits_for = [len(before) for before in needs]
    ready = [(position[group[0]], i) for i, group in enumerate(groups) if not waits_for[i]]
    ready.sort()
    place: dict[int, int] = {}
    work: list[Work] = []
    while ready:
        _, i = heappop(ready)
        place[i] = len(work)
        depends_on = tuple(sorted(place[each] for each in needs[i]))
        work.append(_work(groups[i], costs, depends_on, fillers, position[groups[i][0]]))
        for user in users[i]:
            waits_for[user] -= 1
            if not waits_for[user]:
                heappush(ready, (position[groups[user][0]], user))
    assert len(work) == len(groups), "fused groups wait for each other"
    return tuple(work)


def _work(
    group: list[Node],
    costs: dict[Node, Cost],
    depends_on: tuple[int, ...],
    fillers: set[Node],
    position: int,
) -> Work:
    node = group[0]
    is_weight_only = all(each in fillers for each in group)
    replicas = {each.meta.get(REPLICA) for each in group}
    replica = replicas.pop() if len(replicas) == 1 else None
    place = float(node.meta.get(PLACE, position))
    if is_collective(node):
        kind = collective_of(str(node.target))
        if kind is None:
            raise GraphError(f"there is no price for the collective {node.target}.")
        num_bytes = max(num_bytes_of(node), *(num_bytes_of(x) for x in node.all_input_nodes))
        return Work(
            name=node.name,
            cost=FREE,
            depends_on=depends_on,
            collective=kind,
            group=group_of(node),
            num_bytes=num_bytes,
            part=Part.EXPERTS if _is_expert_gradient(node) else Part.PLAIN,
            replica=replica,
            place=place,
        )
    part = _part(node, costs[node])
    return Work(
        name=node.name,
        cost=costs[node] if len(group) == 1 else _fused_cost(group),
        depends_on=depends_on,
        is_wait=is_wait(node),
        is_weight_only=is_weight_only,
        part=part,
        operator=(name_of(node.target) or "") if len(group) == 1 else "",
        unknown=_unknown(node, costs[node]),
        key_bytes=_key_bytes(node) if part is Part.ATTENTION else 0,
        expert_bytes=_expert_bytes(node) if part is Part.EXPERTS else 0,
        replica=replica,
        place=place,
    )


def _is_expert_gradient(message: Node) -> bool:
    """Whether what is summed is the gradient of the stacked matrices of experts (three dims)."""
    node = message.all_input_nodes[0]
    sent = _meta(node)
    while node.op == "call_function" and (is_view(node) or node.target is operator.getitem):
        node = node.all_input_nodes[0]
    return isinstance(sent, Tensor) and sent.dim() == 3 and "grouped" in str(node.target)


def _part(node: Node, cost: Cost) -> Part:
    if cost.kind is Kind.ATTENTION:
        return Part.ATTENTION
    return Part.EXPERTS if "grouped" in str(node.target) else Part.PLAIN


def _key_bytes(node: Node) -> int:
    """Of keys and values."""
    return sum(x.numel() * x.element_size() for x in _operands(node)[1:])


_FORWARD_SCORE_BYTES, _BACKWARD_SCORE_BYTES = 9, 11
"""Of a score, by kernels of two bytes a value: softmax (scale and mask in it) reads and writes 4,
dropout reads and writes 4 and a mask of 1; backward dropout moves 5, softmax reads two values and
writes one, 6."""
_KEPT_SCORE_BYTES = 5
"""The softmax's result, the dropout's mask and its result [Korthikanti et al. 2022, arXiv
2205.05198, section 4.1: 5 a s / h of a layer's bytes]."""


def _unfused(work: Work, node: Node, attention: Attention) -> Work:
    """Attention as products over the whole square of scores and passes over it."""
    is_backward = "backward" in str(node.target)
    query, key, value = _operands(node)
    (batch, heads, rows, size), columns, value_size = query.shape, key.shape[2], value.shape[3]
    scores = batch * heads * rows * columns

    def product(inner: int, sizes: tuple[int, int, int]) -> Cost:
        flops = 2 * scores * inner
        return Cost(kind=Kind.MATRIX, flops=flops, dtype=query.dtype, sizes=sizes)

    forward = (
        product(size, (rows, size, columns)),
        Cost(kind=Kind.MEMORY, bytes=_FORWARD_SCORE_BYTES * scores),
        product(value_size, (rows, columns, value_size)),
    )
    if not is_backward:
        kept = _KEPT_SCORE_BYTES * scores if attention == "unfused" else 0
        return replace(work, kernels=forward, score_bytes=kept)
    backward = (
        product(value_size, (rows, value_size, columns)),
        product(value_size, (columns, rows, value_size)),
        Cost(kind=Kind.MEMORY, bytes=_BACKWARD_SCORE_BYTES * scores),
        product(size, (rows, columns, size)),
        product(size, (columns, rows, size)),
    )
    again = forward if attention == "recomputed" else ()
    return replace(work, kernels=again + backward)


def _operands(node: Node) -> list[Tensor]:
    """Query, key and value: the operands with four dims, backward behind the gradient."""
    forms = [x for arg in (*node.args, *node.kwargs.values()) for x in _tensors(_meta(arg))]
    forms = [x for x in forms if x.dim() == 4]
    start = 1 if "backward" in str(node.target) else 0
    return forms[start : start + 3]


def _expert_bytes(node: Node) -> int:
    """Of what has a matrix for each expert: operands and results with three dims."""
    values = [*(_meta(arg) for arg in node.args), node.meta.get("val")]
    matrices = [x for value in values for x in _tensors(value) if x.dim() == 3]
    return sum(_held(x) * x.element_size() for x in matrices)


def _meta(arg: object) -> object:
    return arg.meta.get("val") if isinstance(arg, fx.Node) else None


def _fused_cost(group: list[Node]) -> Cost:
    """What comes in and what goes out, each once."""
    members = set(group)
    read: dict[Node, int] = {}
    written = 0
    for node in group:
        for source in node.all_input_nodes:
            base = _base(source)
            if base not in members:
                read[base] = max(read.get(base, 0), num_bytes_of(source))
        if any(not _stays_inside(user, members) for user in node.users):
            written += num_bytes_of(node)
    return Cost(kind=Kind.MEMORY, bytes=sum(read.values()) + written)


def _base(node: Node) -> Node:
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def _stays_inside(user: Node, members: set[Node]) -> bool:
    if user in members:
        return True
    if user.op != "call_function" or not is_view(user):
        return False
    return all(_stays_inside(each, members) for each in user.users)


def num_bytes_of(node: Node) -> int:
    """Bytes of the tensors that a node yields; one that is expanded has what it has in memory."""
    return sum(_held(x) * x.element_size() for x in _tensors(node.meta.get("val")))


def _held(x: Tensor) -> int:
    count = 1
    for size, step in zip(x.shape, x.stride(), strict=True):
        count *= size if step else 1
    return int(count)


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [x for x in value if isinstance(x, Tensor)]
    return []
