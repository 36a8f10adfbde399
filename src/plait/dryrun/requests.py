"""In what order a call of a template asks for memory and gives it back, as the executor does.

`saved.py` says how much lives at the peak; the caching allocator needs the order too, for what it
wastes depends on who died before (`job_fragments.py`).
"""

# pyright: basic
# (fx nodes are not typed.)

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from plait.dryrun.saved import base_of, has_shape_in, saved_inputs
from plait.dryrun.work import num_bytes_of
from plait.graph.graph import Module, Node, Role, Template
from plait.graph.partition import is_view

Change = tuple[int, bool]
"""A tensor's number in its call, and whether it is made or given back."""


@dataclass(frozen=True, kw_only=True)
class CallRequests:
    """One call of a template. sizes: bytes by number; forward, backward: changes in their order.

    results, gradients: numbers that live until the next call of that pass has ended (the layer's
    output, its input's gradient). What the forward saves dies in the backward. input_bytes: of the
    layer's input, 0 where the backward does without it. experts: numbers of which a rank of ep
    holds its share only.
    """

    sizes: Mapping[int, int]
    forward: tuple[Change, ...]
    backward: tuple[Change, ...] = ()
    results: frozenset[int] = frozenset()
    gradients: frozenset[int] = frozenset()
    input_bytes: int = 0
    experts: frozenset[int] = frozenset()

    @property
    def saved(self) -> tuple[int, ...]:
        """What lives from the forward to the backward."""
        given_back = {number for number, is_made in self.forward if not is_made}
        made = (number for number, is_made in self.forward if is_made)
        return tuple(n for n in made if n not in given_back and n not in self.results)


def requests_of(
    template: Template, own: Collection[int], experts: Collection[tuple[int, ...]] = ()
) -> CallRequests:
    """The requests of a call; arguments as for `held_of`."""
    forward = _numbers(template.forward, 0)
    count = len(template.results)
    outputs = _outputs(template.forward)
    results = _numbers_of(outputs[:count], forward)
    saved_nodes = [base_of(node) for node in outputs[count:] if hasattr(node, "op")]
    saved = {forward[node] for node in saved_nodes if node in forward}
    sizes = {number: num_bytes_of(node) for node, number in forward.items()}
    found = CallRequests(
        sizes=sizes,
        forward=_changes(template.forward, forward, kept=saved | results),
        results=frozenset(results - saved),
        experts=_of_experts(forward, experts),
    )
    if template.backward is None:
        return found
    backward = _numbers(template.backward, len(template.forward.graph.nodes))
    computed = iter(outputs[count:])
    given: dict[Node, int] = {}
    places = (node for node in template.backward.graph.nodes if node.op == "placeholder")
    for value, node in zip(template.saved, places, strict=False):  # tangents follow
        source = base_of(next(computed)) if value.role is Role.SAVED else None
        if source in forward:
            given[node] = forward[source]
    outputs = _outputs(template.backward)
    kinds = [
        template.arguments[i].role is Role.PARAMETER
        for i, value in enumerate(template.gradients)
        if value is not None
    ]
    to_inputs = [x for x, of_weight in zip(outputs, kinds, strict=False) if not of_weight]
    gradients = _numbers_of(to_inputs, backward)
    ends = _numbers_of(outputs, backward)
    changes = _changes(template.backward, backward | given, kept=ends, alive=saved)
    return replace(
        found,
        sizes=sizes | {number: num_bytes_of(node) for node, number in backward.items()},
        backward=(*changes, *((number, False) for number in sorted(ends - gradients))),
        gradients=frozenset(gradients),
        input_bytes=sum(value.num_bytes for value in saved_inputs(template, own)),
        experts=found.experts | _of_experts(backward, experts),
    )


def with_scores(call: CallRequests, saved_bytes: int, scratch_bytes: int) -> CallRequests:
    """With what attention that is not one kernel holds of its scores: kept, and again backward."""
    if not (saved_bytes or scratch_bytes):
        return call
    first = 1 + max(call.sizes, default=0)
    scores, scratch, again = first, first + 1, first + 2
    sizes = {**call.sizes, scores: saved_bytes, again: scratch_bytes}
    sizes[scratch] = max(0, scratch_bytes - saved_bytes)
    around = ((scores, True), (scratch, True))
    return replace(
        call,
        sizes=sizes,
        forward=(*around, *call.forward, (scratch, False)),
        backward=((again, True), *call.backward, (again, False), (scores, False)),
    )


def _outputs(module: Module) -> list[Node]:
    return list(module.graph.output_node().args[0])


def _numbers(module: Module, first: int) -> dict[Node, int]:
    """Of what a program makes."""
    return {
        node: first + i
        for i, node in enumerate(module.graph.nodes)
        if node.op == "call_function" and not is_view(node)
    }


def _numbers_of(nodes: Iterable[object], numbers: Mapping[Node, int]) -> set[int]:
    bases = {base_of(node) for node in nodes if isinstance(node, fx.Node)}
    return {numbers[base] for base in bases if base in numbers}


def _of_experts(
    numbers: Mapping[Node, int], experts: Collection[tuple[int, ...]]
) -> frozenset[int]:
    return frozenset(n for node, n in numbers.items() if experts and has_shape_in(node, experts))


def _changes(
    module: Module,
    numbers: Mapping[Node, int],
    *,
    kept: Collection[int],
    alive: Collection[int] = (),
) -> tuple[Change, ...]:
    """Each tensor where it is made, and behind its last use; alive: those that are there before."""
    nodes = list(module.graph.nodes)
    last: dict[int, int] = dict.fromkeys(alive, 0)
    for i, node in enumerate(nodes):
        used = [base_of(source) for source in node.all_input_nodes]
        for base in (node, *used):
            if base in numbers:
                last[numbers[base]] = i
    dies: dict[int, list[int]] = {}
    for number, i in last.items():
        if number not in kept:
            dies.setdefault(i, []).append(number)
    found: list[Change] = []
    for i, node in enumerate(nodes):
        if node.op == "call_function" and node in numbers:
            found.append((numbers[node], True))
        found += [(number, False) for number in dies.get(i, ())]
    return tuple(found)
