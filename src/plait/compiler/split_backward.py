"""The backward in two programs: gradients of activations, and gradients of parameters.

Pipelines need only the first before the stage below can go on; the second fills what would be idle
(the zero-bubble schedules [Qi et al. 2023, arXiv:2401.10241]). Each kind of block is split once.
The same kernels run on the same values, so the numbers keep their bits.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from plait.graph.graph import Module, Node, Template, call, call_of, module_of
from plait.graph.partition import extract

INPUT_PART, WEIGHT_PART = "backward_input", "backward_weight"


@dataclass
class SplitBackward:
    """The two root modules by program name, and the parts of templates that they call.

    weight_inputs: what the second takes: placeholders of the whole backward by name, or "kept:<i>",
    the i-th value that the first yields after its gradients.
    """

    programs: dict[str, Module]
    weight_inputs: list[str]
    parts: dict[str, Module] = field(default_factory=dict)


@dataclass(frozen=True)
class _Parts:
    """A template's backward in two: positions of gradients, and what passes between."""

    name: str
    input_gradients: list[int]
    weight_gradients: list[int]
    input_arguments: list[int]
    weight_arguments: list[int]
    num_kept: int


def split_backward(
    backward: Module, templates: dict[str, Template], is_weight: Sequence[bool]
) -> SplitBackward:
    """Split a root backward whose i-th result is the gradient of a parameter if is_weight[i]."""
    return _Splitter(backward, templates, is_weight).run()


class _Splitter:
    def __init__(
        self, backward: Module, templates: dict[str, Template], is_weight: Sequence[bool]
    ) -> None:
        self.backward, self.templates, self.is_weight = backward, templates, is_weight
        self.parts: dict[tuple, _Parts] = {}
        self.modules: dict[str, Module] = {}
        self.first, self.second = fx.Graph(), fx.Graph()
        self.in_first: dict[Node, Node] = {}
        self.in_second: dict[Node, Node] = {}
        self.kept: list[Node] = []  # values of the first that the second takes
        self.weight_inputs: list[str] = []

    def run(self) -> SplitBackward:
        nodes = list(self.backward.graph.nodes)
        results = self.backward.graph.output_node().args[0]
        weight_only = self.weight_only(nodes, results)
        for node in nodes:
            if node.op == "placeholder":
                self.in_first[node] = self.first.placeholder(node.name)
        for node in nodes:
            if call_of(node) is not None:
                self.split_call(node, weight_only)
            elif node.op == "get_attr":
                self.in_first[node] = self.first.node_copy(node)
            elif node.op == "call_function" and node not in self.in_first | self.in_second:
                raise AssertionError(f"a root holds calls only, found {node.format_node()}")
        firsts = [i for i, weight in enumerate(self.is_weight) if not weight]
        seconds = [i for i, weight in enumerate(self.is_weight) if weight]
        self.first.output(tuple([self.in_first[results[i]] for i in firsts] + self.kept))
        self.second.output(tuple(self.of_second(results[i]) for i in seconds))
        return SplitBackward(
            {
                INPUT_PART: module_of(self.backward, self.first),
                WEIGHT_PART: module_of(self.backward, self.second),
            },
            self.weight_inputs,
            self.modules,
        )

    def weight_only(self, nodes: list[Node], results: Sequence[Node]) -> set[Node]:
        """Gradients that lead to parameters only: they wait for the second program."""
        waiting = {node for node, weight in zip(results, self.is_weight, strict=True) if weight}
        for node in reversed(nodes):
            template = call_of(node)
            if template is None:
                continue
            # What a call hands on for a waiting gradient (a shared parameter) waits as well.
            described = self.templates[template[0]]
            gradients = [i for i, value in enumerate(described.gradients) if value is not None]
            threaded = list(node.args[len(node.args) - len(described.threaded) :])
            for user in node.users:
                operand = gradients[user.args[1]]
                if user in waiting and operand in described.threaded:
                    waiting.add(threaded[described.threaded.index(operand)])
        return waiting

    def split_call(self, node: Node, weight_only: set[Node]) -> None:
        template = str(node.args[0])
        users = {user.args[1]: user for user in node.users}
        waiting = tuple(sorted(i for i, user in users.items() if user in weight_only))
        parts = self.parts_of(template, waiting)
        arguments = node.args[2:]
        given = [self.in_first[arguments[i]] for i in parts.input_arguments]
        first = None
        if parts.input_gradients or parts.num_kept:
            first = self.first.call_function(call, (parts.name, INPUT_PART, *given))
        for at, i in enumerate(parts.input_gradients):
            if i in users:
                self.in_first[users[i]] = self.part(self.first, first, at)
        if not parts.weight_gradients:
            return
        kept = [
            self.keep(self.part(self.first, first, len(parts.input_gradients) + i))
            for i in range(parts.num_kept)
        ]
        given = [self.of_second(arguments[i]) for i in parts.weight_arguments]
        second = self.second.call_function(call, (parts.name, WEIGHT_PART, *given, *kept))
        for at, i in enumerate(parts.weight_gradients):
            if i in users:
                self.in_second[users[i]] = self.part(self.second, second, at)

    @staticmethod
    def part(graph: fx.Graph, node: Node, i: int) -> Node:
        return graph.call_function(operator.getitem, (node, i))

    def keep(self, value: Node) -> Node:
        """Let the first program yield a value, and the second take it."""
        self.weight_inputs.append(f"kept:{len(self.kept)}")
        self.kept.append(value)
        return self.second_placeholder(f"kept_{len(self.kept) - 1}")

    def second_placeholder(self, name: str) -> Node:
        first_call = next((n for n in self.second.nodes if n.op != "placeholder"), None)
        if first_call is None:
            return self.second.placeholder(name)
        with self.second.inserting_before(first_call):
            return self.second.placeholder(name)

    def of_second(self, node: Node) -> Node:
        """The value in the second program: made there, an input of the backward, or kept."""
        if node not in self.in_second:
            if node.op == "placeholder":
                self.weight_inputs.append(node.name)
                self.in_second[node] = self.second_placeholder(node.name)
            else:
                self.in_second[node] = self.keep(self.in_first[node])
        return self.in_second[node]

    def parts_of(self, name: str, waiting: tuple[int, ...]) -> _Parts:
        key = (name, waiting)
        if key not in self.parts:
            parts_name = f"{name}_split{len(self.parts)}"
            backward = self.templates[name].backward
            assert backward is not None
            self.parts[key], modules = _split_template(backward, waiting, parts_name)
            self.modules |= modules
        return self.parts[key]


def _split_template(
    backward: Module, waiting: tuple[int, ...], name: str
) -> tuple[_Parts, dict[str, Module]]:
    placeholders = backward.graph.find_nodes(op="placeholder")
    results = backward.graph.output_node().args[0]
    nodes = [n for n in backward.graph.nodes if n.op not in ("placeholder", "output")]
    now = [i for i in range(len(results)) if i not in waiting]
    early = _ancestors([results[i] for i in now])
    late = _ancestors([results[i] for i in waiting]) - early
    wanted = {source for node in late for source in node.all_input_nodes} | {
        results[i] for i in waiting
    }
    kept = [n for n in nodes if n in early and n in wanted]
    early_inputs = [i for i, n in enumerate(placeholders) if n in early]
    late_inputs = [i for i, n in enumerate(placeholders) if n in wanted]
    first = extract(
        backward,
        [n for n in nodes if n in early],
        [placeholders[i] for i in early_inputs],
        [*(results[i] for i in now), *kept],
    )
    second = extract(
        backward,
        [n for n in nodes if n in late],
        [*(placeholders[i] for i in late_inputs), *kept],
        [results[i] for i in waiting],
    )
    parts = _Parts(name, now, list(waiting), early_inputs, late_inputs, len(kept))
    return parts, {f"{name}.{INPUT_PART}": first, f"{name}.{WEIGHT_PART}": second}


def _ancestors(nodes: Sequence[Node]) -> set[Node]:
    found: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
