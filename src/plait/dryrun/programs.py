"""The programs of a captured graph, in the order of the model: each template as it is called.

Of each: its operations, forward and backward, what it holds and what it asks the allocator for.
"""

# pyright: basic
# (fx nodes are not typed.)

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from plait.compiler.order import fillers_of, weight_arguments
from plait.cost.operations import Cost
from plait.dryrun.piece import Shape
from plait.dryrun.requests import CallRequests, requests_of, with_scores
from plait.dryrun.saved import Held, Tensor, held_of
from plait.dryrun.work import Work, work_of
from plait.graph.cut import BETWEEN
from plait.graph.graph import BACKWARD, FORWARD, Graph, Role, Template, call_of
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
        (node, *called)
        for node in graph.root.graph.nodes
        if (called := call_of(node)) and called[1] != BACKWARD
    ]
    shared = Counter(
        x
        for node, _, which in calls
        if which == FORWARD
        for x in node.args[2:]
        if isinstance(x, fx.Node)
    )
    seen: dict[str, _Passes] = {}
    found: list[Program] = []
    for node, name, _ in calls:
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
    experts = sum(_count(v.shape) for v in of_experts)
    stacked = {tuple(map(int, v.shape)) for v in of_experts}
    scores = _scores(*passes, shape)
    return Program(
        template.name,
        *passes,
        held=_with_scores(held_of(template, own, stacked), *scores),
        calls=(with_scores(requests_of(template, own, stacked), *scores),),
        num_elements=sum(_count(v.shape) for v in parameters) - experts,
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
    own, all_of = half.held, whole.held

    def at_least(name: str) -> int:
        return max(getattr(own, name), getattr(all_of, name) // 2)

    return replace(
        half,
        forward=_works_seeing_all(half.forward, whole.forward),
        backward=_works_seeing_all(half.backward, whole.backward),
        held=replace(
            own,
            saved_bytes=at_least("saved_bytes"),
            forward_peak_bytes=at_least("forward_peak_bytes"),
            backward_peak_bytes=at_least("backward_peak_bytes"),
            expert_peak_bytes=at_least("expert_peak_bytes"),
        ),
        calls=tuple(
            replace(
                call,
                sizes={n: max(x, other.sizes[n] // 2) for n, x in call.sizes.items()},
                input_bytes=max(call.input_bytes, other.input_bytes // 2),
            )
            for call, other in zip(half.calls, whole.calls, strict=True)
        ),
    )


def _works_seeing_all(half: tuple[Work, ...], whole: tuple[Work, ...]) -> tuple[Work, ...]:
    return tuple(
        replace(
            work,
            cost=_cost_seeing_all(work.cost, other.cost),
            num_bytes=max(work.num_bytes, other.num_bytes // 2),
            key_bytes=max(work.key_bytes, other.key_bytes // 2),
            kernels=tuple(map(_cost_seeing_all, work.kernels, other.kernels)),
        )
        for work, other in zip(half, whole, strict=True)
    )


def _cost_seeing_all(half: Cost, whole: Cost) -> Cost:
    return replace(
        half, bytes=max(half.bytes, whole.bytes // 2), flops=max(half.flops, whole.flops // 2)
    )


def without_cost(program: Program) -> Program:
    """The same operations and requests, for nothing: the low end of a line through nothing."""

    def free(works: tuple[Work, ...]) -> tuple[Work, ...]:
        return tuple(
            replace(
                work,
                cost=replace(work.cost, bytes=0, flops=0),
                num_bytes=0,
                key_bytes=0,
                kernels=tuple(replace(each, bytes=0, flops=0) for each in work.kernels),
            )
            for work in works
        )

    return replace(
        program,
        forward=free(program.forward),
        backward=free(program.backward),
        held=Held(saved_bytes=0, forward_peak_bytes=0, backward_peak_bytes=0),
        calls=tuple(
            replace(call, sizes=dict.fromkeys(call.sizes, 0), input_bytes=0)
            for call in program.calls
        ),
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


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


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
