"""The programs of a captured graph, in the order of the model: each template as it is called.

Of each: its operations, forward and backward, what it holds and what it asks the allocator for.
"""

# pyright: basic
# (fx nodes are not typed.)

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx

from plait.compiler.order import fillers_of, weight_arguments
from plait.cost.operations import Cost
from plait.dryrun.piece import Shape
from plait.dryrun.requests import CallRequests, requests_of, with_scores
from plait.dryrun.saved import Held, Tensor, held_of
from plait.dryrun.work import Work, work_of
from plait.graph.cut import BETWEEN
from plait.graph.graph import FORWARD, Graph, Role, Template, call_of
from plait.plan.parallel_plan import Recompute

_Passes = tuple[tuple[Work, ...], tuple[Work, ...]]


@dataclass(frozen=True)
class Program:
    """A template as it is called: both programs, and what they hold."""

    name: str
    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    held: Held
    num_elements: int
    num_expert_elements: int
    source: str
    parameters: tuple[Tensor, ...]
    calls: tuple[CallRequests, ...]


def programs_of(graph: Graph, shape: Shape) -> list[Program]:
    """The templates that the root calls, in order, forward and backward."""
    weights = weight_arguments(graph)
    calls = [
        (node, called[0])
        for node in graph.root.graph.nodes
        if (called := call_of(node)) and called[1] == FORWARD
    ]
    shared = Counter(x for node, _ in calls for x in node.args[2:] if isinstance(x, fx.Node))
    seen: dict[str, _Passes] = {}
    found: list[Program] = []
    for node, name in calls:
        template = graph.templates[name]
        if name not in seen:
            seen[name] = _passes(template, weights.get(name, set()), shape)
        own = [
            i
            for i, x in enumerate(node.args[2:])
            if isinstance(x, fx.Node) and x.op == "call_function" and shared[x] == 1
        ]
        found.append(_program(template, seen[name], node, own, shape))
    return found


def _passes(template: Template, weights: set[int], shape: Shape) -> _Passes:
    """The operations of its forward and of its backward."""
    forward = work_of(template.forward, shape.kernels, attention=shape.attention)
    if template.backward is None:
        return forward, ()
    fillers = fillers_of(template, weights)
    return forward, work_of(template.backward, shape.kernels, fillers, shape.attention)


def _program(
    template: Template, passes: _Passes, call: fx.Node, own: Sequence[int], shape: Shape
) -> Program:
    parameters = [
        x.meta["val"]
        for x in call.args[2:]
        if isinstance(x, fx.Node) and x.op == "placeholder" and x.meta["val"].role is Role.PARAMETER
    ]
    of_experts = [v for v in parameters if ".experts." in v.name]
    experts = sum(math.prod(v.shape) for v in of_experts)
    stacked = {tuple(map(int, v.shape)) for v in of_experts}
    scores = _scores(*passes, shape)
    return Program(
        template.name,
        *passes,
        held=_with_scores(held_of(template, own, stacked), *scores),
        calls=(with_scores(requests_of(template, own, stacked), *scores),),
        num_elements=sum(math.prod(v.shape) for v in parameters) - experts,
        num_expert_elements=experts,
        source=template.block,
        parameters=tuple(
            Tensor(num_bytes=value.num_bytes, name=value.name) for value in parameters
        ),
    )


def seeing_all(half: Program, whole: Program) -> Program:
    """Half of a sequence whose tokens see all of it, from programs of half a sequence and of one.

    What grows with the tokens costs half as much or more in the first. What grows with their
    square (attention, a mask, scores) costs less; half of the queries see all keys: half.
    """
    return _combined(half, whole, lambda own, all_of: max(own, all_of // 2))


def without_cost(program: Program) -> Program:
    """The same operations and requests, for nothing: the low end of a line through nothing."""
    return _combined(program, program, lambda own, _: 0)


def _combined(one: Program, two: Program, take: Callable[[int, int], int]) -> Program:
    """One program, each of its figures taken from those of both, which do the same."""

    def cost(a: Cost, b: Cost) -> Cost:
        return replace(a, bytes=take(a.bytes, b.bytes), flops=take(a.flops, b.flops))

    def work(a: Work, b: Work) -> Work:
        return replace(
            a,
            cost=cost(a.cost, b.cost),
            num_bytes=take(a.num_bytes, b.num_bytes),
            key_bytes=take(a.key_bytes, b.key_bytes),
            kernels=tuple(map(cost, a.kernels, b.kernels)),
        )

    def call(a: CallRequests, b: CallRequests) -> CallRequests:
        return replace(
            a,
            sizes={number: take(size, b.sizes[number]) for number, size in a.sizes.items()},
            input_bytes=take(a.input_bytes, b.input_bytes),
        )

    own, other = one.held, two.held
    return replace(
        one,
        forward=tuple(map(work, one.forward, two.forward)),
        backward=tuple(map(work, one.backward, two.backward)),
        held=replace(
            own,
            saved_bytes=take(own.saved_bytes, other.saved_bytes),
            forward_peak_bytes=take(own.forward_peak_bytes, other.forward_peak_bytes),
            backward_peak_bytes=take(own.backward_peak_bytes, other.backward_peak_bytes),
            expert_peak_bytes=take(own.expert_peak_bytes, other.expert_peak_bytes),
        ),
        calls=tuple(map(call, one.calls, two.calls)),
    )


def _scores(forward: Sequence[Work], backward: Sequence[Work], shape: Shape) -> tuple[int, int]:
    """Bytes that attention that is not fused keeps of its scores, and while it runs.

    What runs again keeps nothing.
    """
    one = max((each.score_bytes for each in (*forward, *backward)), default=0)
    saved = 0 if shape.recompute is Recompute.FULL else sum(each.score_bytes for each in forward)
    return saved, one


def _with_scores(held: Held, saved: int, one: int) -> Held:
    scores = (Tensor(num_bytes=saved, name="scores of attention"),) if saved else ()
    return replace(
        held,
        saved=(*held.saved, *scores),
        saved_bytes=held.saved_bytes + saved,
        forward_peak_bytes=held.forward_peak_bytes + one - min(one, saved),
        backward_peak_bytes=held.backward_peak_bytes + one,
    )


def by_place(programs: Sequence[Program]) -> list[Program]:
    """What stands before the layers as one, each layer, and what stands behind as one."""
    layers = [i for i, each in enumerate(programs) if each.source != BETWEEN]
    if not layers:
        return []
    first, last = layers[0], layers[-1]
    return [
        _joined(programs[:first]),
        *programs[first : last + 1],
        _joined(programs[last + 1 :]),
    ]


def _joined(programs: Sequence[Program]) -> Program:
    """Several programs as one, one after another."""
    return Program(
        name="+".join(each.name for each in programs),
        forward=_in_turn([each.forward for each in programs]),
        backward=_in_turn([each.backward for each in reversed(programs)]),
        held=Held(
            saved_bytes=sum(each.held.saved_bytes for each in programs),
            forward_peak_bytes=max((each.held.forward_peak_bytes for each in programs), default=0),
            backward_peak_bytes=max(
                (each.held.backward_peak_bytes for each in programs), default=0
            ),
            expert_peak_bytes=max((each.held.expert_peak_bytes for each in programs), default=0),
            saved=tuple(x for each in programs for x in each.held.saved),
        ),
        num_elements=sum(each.num_elements for each in programs),
        num_expert_elements=sum(each.num_expert_elements for each in programs),
        source=BETWEEN,
        parameters=tuple(x for each in programs for x in each.parameters),
        calls=tuple(call for each in programs for call in each.calls),
    )


def _in_turn(programs: Sequence[tuple[Work, ...]]) -> tuple[Work, ...]:
    found: list[Work] = []
    for program in programs:
        start = len(found)
        found += [
            replace(work, depends_on=tuple(start + i for i in work.depends_on)) for work in program
        ]
    return tuple(found)


def unknown_operators(programs: Sequence[Program]) -> tuple[str, ...]:
    """Warn of operators that nobody gave a cost; empty if there is none."""
    works = (work for each in programs for work in (*each.forward, *each.backward))
    unknown = sorted({work.unknown for work in works} - {""})
    if not unknown:
        return ()
    return (
        f"warning: no cost is known of {', '.join(unknown)}: priced by the bytes that go in and "
        "out. Register a formula with torch.utils.flop_counter.register_flop_formula.",
    )
