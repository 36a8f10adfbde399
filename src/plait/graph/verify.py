"""What must hold in a graph after every pass, checked in time linear in its nodes.

Each template is checked once, however often it is called. A broken rule raises GraphError, which
names the place, the node and the rule: it is a defect of a pass or of capture, not of the model.
"""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalIterable=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false
# (Arguments of fx nodes are not typed.)

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from torch import fx

from plait.graph.collectives import is_collective
from plait.graph.graph import BACKWARD, FORWARD, Graph, Role, Template, Value, call_of
from plait.graph.random_nodes import is_random
from plait.graph.verify_calls import tangents_of, verify_calls
from plait.graph.verify_nodes import (
    expect,
    fail,
    text_of,
    verify_nodes,
    verify_part,
)

_ROOT = "the root"
_SAVED = "forward and backward of a template agree on what is saved"
_PAIRS = "each tangent belongs to an output, each gradient to an input"
_DIRECTION = "the forward does not rest on tangents or on the backward"
_BACKWARD_TAGS = ("is_backward", "must_be_in_backward")


def verify(graph: Graph) -> None:
    """Check every rule that one graph can show. Raises GraphError at the first that is broken.

    Of a graph without described inputs and outputs only the nodes are checked.
    """
    for name, template in graph.templates.items():
        if name != template.name:
            fail(_ROOT, name, "a template is known by its name", f"it is called {template.name}")
        _verify_template(template)
    verify_nodes(graph.root, _ROOT)
    verify_calls(graph)
    if graph.inputs or graph.outputs:
        verify_part(graph.root, _ROOT, graph.inputs, graph.outputs)
        _verify_roles(graph)
    tangents = graph.values(Role.TANGENT)
    _verify_direction(graph.root, _ROOT, graph.num_forward_outputs, len(tangents))


def verify_pass(before: Graph, after: Graph) -> None:
    """Check the graph after a pass, and that it draws and communicates as the graph before.

    Counted as if every call were inlined: random operators and collectives are the same, in the
    same order. A pass that splits or reorders them on purpose is checked with `verify` alone.
    """
    verify(after)
    rules: list[tuple[Callable[[fx.Node], bool], str, str]] = [
        (is_random, "random operator", "a pass neither drops, repeats nor moves random operators"),
        (is_collective, "collective", "a pass keeps the collectives in their order"),
    ]
    for is_one, kind, rule in rules:
        were, are = list(_all_of(before, is_one)), list(_all_of(after, is_one))
        if were == are:
            continue
        missing, added = Counter(were) - Counter(are), Counter(are) - Counter(were)
        if missing or added:
            parts = [f"{text} is gone" for text in missing] + [f"{text} is new" for text in added]
            fail("the graph after the pass", f"{kind}s", rule, "; ".join(parts))
        moved = next(new for old, new in zip(were, are, strict=True) if old != new)
        fail("the graph after the pass", moved, rule, f"this {kind} has moved")


def _verify_template(template: Template) -> None:
    where = f"template {template.name}"
    yielded = template.yields(FORWARD)
    verify_part(template.forward, f"{where}, {FORWARD}", template.arguments, yielded)
    if template.backward is None:
        if template.joint is not None or template.saved or any(template.gradients):
            rule = "what is saved, and gradients, come with a backward"
            fail(where, template.block, rule, "it has no backward")
        return
    for value in template.saved:
        _verify_saved(template, value, where)
    takes = [*template.saved, *tangents_of(template)]
    verify_part(template.backward, f"{where}, {BACKWARD}", takes, template.yields(BACKWARD))
    if len(template.gradients) != len(template.arguments):
        found = f"{len(template.gradients)} gradients, {len(template.arguments)} arguments"
        fail(where, template.block, "each argument has a gradient, or None", found)
    for i, gradient in enumerate(template.gradients):
        if gradient is not None and gradient.shape != template.arguments[i].shape:
            found = f"{text_of(gradient)} for {text_of(template.arguments[i])}"
            fail(where, f"gradient {i}", _PAIRS, found)
    if template.joint is not None:
        _verify_joint(template, template.joint, f"{where}, joint")


def _verify_saved(template: Template, value: Value, where: str) -> None:
    if value.role is not Role.INPUT:
        return
    number = int(value.name)
    if number >= len(template.arguments):
        found = f"there are only {len(template.arguments)} arguments"
        fail(where, f"saved argument {number}", _SAVED, found)
    expect(where, f"saved argument {number}", _SAVED, template.arguments[number], value)


def _verify_joint(template: Template, joint: fx.GraphModule, where: str) -> None:
    tangents = tangents_of(template)
    yielded = [*template.results, *template.gradients]
    verify_part(joint, where, [*template.arguments, *tangents], yielded)
    _verify_direction(joint, where, len(template.results), len(tangents))
    whole = Counter(str(node.target) for node in joint.graph.nodes if is_random(node))
    parts = Counter(
        str(node.target)
        for part in (template.forward, template.backward)
        if part is not None
        for node in part.graph.nodes
        if is_random(node)
    )
    if whole != parts:
        found = f"the joint graph draws with {dict(whole)}, its two parts with {dict(parts)}"
        fail(where, "random operators", "each random operator runs once", found)


def _verify_roles(graph: Graph) -> None:
    """Check that tangents and gradients belong to outputs and inputs."""
    results = graph.outputs[: graph.num_forward_outputs]
    if any(value.role is Role.GRADIENT for value in results):
        rule = "the outputs of the forward come before the gradients"
        fail(_ROOT, "outputs", rule, f"{graph.num_forward_outputs} of them are the forward's")
    tangents, gradients = graph.values(Role.TANGENT), graph.values(Role.GRADIENT)
    if gradients and not tangents:
        fail(_ROOT, "outputs", _PAIRS, "there are gradients and no tangent")
    if any(v.role is Role.TANGENT for v in graph.inputs[: len(graph.inputs) - len(tangents)]):
        fail(_ROOT, "inputs", "tangents come after the other inputs", "one comes before")
    sources = [value for value in graph.inputs if value.role is not Role.TANGENT]
    _verify_pairs(tangents, {v.name: v for v in results if v.role is Role.OUTPUT})
    _verify_pairs(gradients, {value.name: value for value in sources})


def _verify_pairs(values: Sequence[Value], partners: dict[str, Value]) -> None:
    counts = Counter(value.name for value in values)
    for value in values:
        place = f"{value.role.value} {value.name}"
        partner = partners.get(value.name)
        if partner is None:
            fail(_ROOT, place, _PAIRS, "there is nothing of that name")
        if counts[value.name] > 1:
            fail(_ROOT, place, _PAIRS, "it stands there twice")
        if value.shape != partner.shape:
            fail(_ROOT, place, _PAIRS, f"{text_of(value)} for {text_of(partner)}")


def _verify_direction(
    module: fx.GraphModule, where: str, num_results: int, num_tangents: int
) -> None:
    """Check that neither results nor calls of the forward rest on the backward."""
    placeholders = module.graph.find_nodes(op="placeholder")
    backward = set(placeholders[len(placeholders) - num_tangents :])
    for node in module.graph.nodes:
        called = call_of(node)
        if node.op != "call_function":
            continue
        culprit = next((source for source in node.all_input_nodes if source in backward), None)
        if called is not None and called[1] == FORWARD and culprit is not None:
            fail(where, node.name, _DIRECTION, f"it takes {culprit.name}")
        is_tagged = node.meta.get("partitioner_tag") in _BACKWARD_TAGS
        if culprit is not None or is_tagged or (called is not None and called[1] == BACKWARD):
            backward.add(node)
    (outputs,) = module.graph.output_node().args
    for i, node in enumerate(outputs[:num_results]):
        if node in backward:
            fail(where, f"output {i} ({node.name})", _DIRECTION, "the backward makes it")


def _all_of(graph: Graph, is_one: Callable[[fx.Node], bool]) -> Iterator[str]:
    """Operators of a kind in the order in which they run, calls inlined."""
    inside = {
        (name, part): [_signature(node) for node in module.graph.nodes if is_one(node)]
        for name, template in graph.templates.items()
        for part, module in ((FORWARD, template.forward), (BACKWARD, template.backward))
        if module is not None
    }
    for node in graph.root.graph.nodes:
        called = call_of(node)
        if called is not None:
            yield from inside[called]
        elif is_one(node):
            yield _signature(node)


def _signature(node: fx.Node) -> str:
    """The operator and its constants: which group, which probability."""
    constants = [str(x) for x in node.args if isinstance(x, int | float | str | bool)]
    return f"{node.target}({', '.join(constants)})"
