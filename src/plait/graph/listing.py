"""A graph as lines to show: one a node, in sections of the root and of each template.

A call is one line of the root. Taking one of several results is no line of its own: it is written
`name.0`, `name.1`.
"""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
# pyright: reportOptionalIterable=false, reportOptionalSubscript=false, reportCallIssue=false
# pyright: reportIndexIssue=false
# (Arguments of fx nodes are not typed.)

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from plait.graph.graph import BACKWARD, FORWARD, Graph, Role, Template, Value, call_of, describe
from plait.graph.source import place_of
from plait.graph.verify_nodes import text_of

_Described = Sequence[tuple[str, str]]  # role and name of each value at an edge


@dataclass(frozen=True)
class Line:
    """One node: its name, what it does to which operands, what it makes, the user's line.

    role: of what stands at the edge; calls: the template, of a call.
    """

    name: str
    operator: str
    operands: str
    value: str
    source: str = ""
    role: str = ""
    calls: str = ""

    def __str__(self) -> str:
        does = self.operator if self.role else f"{self.operator}({self.operands})"
        made = f"  -> {self.value}" if self.value else ""
        return f"{self.name} = {does}{made}" + (f"  # {self.source}" if self.source else "")


@dataclass(frozen=True)
class Section:
    """Lines of one fx graph: what it takes, what it does, what it returns."""

    title: str
    lines: tuple[Line, ...]
    results: tuple[Line, ...]

    def __str__(self) -> str:
        lines = [f"  {line}" for line in self.lines]
        results = [f"    {line}" for line in self.results]
        return "\n".join([self.title, *lines, "  return", *results])


def root_section(graph: Graph) -> Section:
    """The root, with its inputs and outputs by role and name."""
    inputs, outputs = (
        [(value.role.value, value.name) for value in values]
        for values in (graph.inputs, graph.outputs)
    )
    return _section("root", graph.root, graph, inputs, outputs)


def template_sections(template: Template, graph: Graph) -> dict[str, Section]:
    """Joint, forward and backward of a template, as far as it has them."""
    arguments = [("argument", str(i)) for i in range(len(template.arguments))]
    tangents = [("tangent", str(i)) for i in template.differentiable]
    tangents += [("tangent of later uses", str(i)) for i in template.threaded]
    results = [("result", value.name) for value in template.results]
    computed = [("saved", value.name) for value in template.computed_saved]
    gradients = [("gradient", str(i)) for i in range(len(template.gradients))]
    present = [("gradient", v.name) for v in template.gradients if v is not None]
    saved = [
        ("saved argument" if value.role is Role.INPUT else "saved", value.name)
        for value in template.saved
    ]
    parts = {
        "joint": (template.joint, [*arguments, *tangents], [*results, *gradients]),
        FORWARD: (template.forward, arguments, [*results, *computed]),
        BACKWARD: (template.backward, [*saved, *tangents], present),
    }
    return {
        part: _section(f"template {template.name}, {part}", module, graph, takes, gives)
        for part, (module, takes, gives) in parts.items()
        if module is not None
    }


def summary(graph: Graph) -> str:
    """Say in one line how large a graph is."""
    calls = sum(call_of(node) is not None for node in graph.root.graph.nodes)
    parameters = sum(value.role is Role.PARAMETER for value in graph.inputs)
    return (
        f"{graph.num_operators()} operators, {calls} calls of {len(graph.templates)} templates, "
        f"{parameters} parameters"
    )


def called(graph: Graph, template: Template) -> str:
    """Say how often a template is called."""
    counts = Counter(call_of(node) for node in graph.root.graph.nodes)
    forward, backward = (counts[template.name, part] for part in (FORWARD, BACKWARD))
    times = f"called {forward} {'time' if forward == 1 else 'times'}"
    return times if template.backward is None else f"{times} forward, {backward} backward"


def _section(
    title: str, module: fx.GraphModule, graph: Graph, takes: _Described, gives: _Described
) -> Section:
    lines: list[Line] = []
    described = iter(takes)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            role, name = next(described, ("input", ""))
            text = f"{role} {name}".strip()
            lines.append(Line(node.name, text, "", _made(node, graph), role=role))
        elif node.op != "output" and not _is_taken(node):
            lines.append(_line(node, graph))
    (outputs,) = module.graph.output_node().args
    names = [f"{role} {name}" for role, name in gives] or [str(i) for i in range(len(outputs))]
    results = [
        Line(
            name, _operand(x), "", _made(x, graph) if isinstance(x, fx.Node) else "", role="result"
        )
        for name, x in zip(names, outputs, strict=False)
    ]
    return Section(title, tuple(lines), tuple(results))


def _line(node: fx.Node, graph: Graph) -> Line:
    if node.op == "get_attr":
        return Line(node.name, f"constant {node.target}", "", _made(node, graph), role="constant")
    target, args, template = _operator(node), node.args, ""
    if call := call_of(node):
        template, target, args = call[0], ".".join(call), args[2:]
    operands = [_operand(x) for x in args]
    operands += [f"{name}={_operand(x)}" for name, x in node.kwargs.items()]
    made = _made(node, graph)
    return Line(node.name, target, ", ".join(operands), made, place_of(node), calls=template)


def _operator(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _operand(x: object) -> str:
    if isinstance(x, fx.Node):
        return f"{_operand(x.args[0])}.{x.args[1]}" if _is_taken(x) else x.name
    if isinstance(x, list):
        return f"[{', '.join(_operand(item) for item in x)}]"
    if isinstance(x, tuple):
        return f"({', '.join(_operand(item) for item in x)})"
    if isinstance(x, Mapping):
        return f"{{{', '.join(f'{name}: {_operand(item)}' for name, item in x.items())}}}"
    return repr(x)


def _is_taken(node: fx.Node) -> bool:
    """Whether it only takes one of several results."""
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node)


def _made(node: fx.Node, graph: Graph) -> str:
    """The form of what a node makes; of a call, how much it saves."""
    call = call_of(node)
    if call and (template := graph.templates.get(call[0])):
        yielded = template.yields(call[1])
        num_saved = sum(value.role is Role.SAVED for value in yielded)
        texts = [text_of(value) for value in yielded if value.role is not Role.SAVED]
        return ", ".join(texts) + (f" and {num_saved} saved" if num_saved else "")
    made = node.meta.get("val")
    values = made if isinstance(made, tuple | list) else [made]
    tensors = [x for x in values if isinstance(x, Tensor | Value)]
    return ", ".join(text_of(describe(Role.OUTPUT, "", x)) for x in tensors)
