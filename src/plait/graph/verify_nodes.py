"""Rules of the nodes of one fx graph, and how a broken rule is told."""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalIterable=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false
# (Arguments of fx nodes are not typed.)

import operator
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import fx

from plait.errors import GraphError
from plait.graph.collectives import is_collective, is_wait
from plait.graph.graph import Value, call_of, describe

_EDGE = "the edge of a graph is as described"


def fail(where: str, node: object, rule: str, found: str) -> NoReturn:
    """Raise the GraphError of a broken rule. found: what is there instead, in a few words."""
    raise GraphError(f"{where}, {node}: {found}. The rule: {rule}.")


def expect(where: str, node: object, rule: str, expected: Value, found: object) -> None:
    """Compare two ends of an edge; names and roles may differ, and a bare tensor has no layout."""
    value = describe(expected.role, expected.name, found)
    same = (
        value.shape == expected.shape
        and _strides_that_count(value) == _strides_that_count(expected)
        and value.dtype == expected.dtype
        and value.device == expected.device
    )
    if not same:
        fail(where, node, rule, f"{text_of(value)} where {text_of(expected)} is expected")
    if isinstance(found, Value) and found.layout != expected.layout:
        fail(where, node, rule, f"layout {found.layout} where {expected.layout} is expected")


def _strides_that_count(value: Value) -> list[int]:
    """Of dims with one element, any stride is the same."""
    return [s for size, s in zip(value.shape, value.stride, strict=True) if size != 1]


def verify_part(
    module: fx.GraphModule, where: str, inputs: Sequence[Value], outputs: Sequence[Value | None]
) -> None:
    """Check the nodes of a module, and that its edge is as described. Allows None for None."""
    verify_nodes(module, where)
    placeholders = module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(inputs):
        fail(where, "inputs", _EDGE, f"there are {len(placeholders)}, and {len(inputs)} described")
    for node, value in zip(placeholders, inputs, strict=True):
        expect(where, node.name, _EDGE, value, node.meta["val"])
    (results,) = module.graph.output_node().args
    if len(results) != len(outputs):
        fail(where, "outputs", _EDGE, f"there are {len(results)}, and {len(outputs)} described")
    for i, (node, value) in enumerate(zip(results, outputs, strict=True)):
        if not isinstance(node, fx.Node) or value is None:
            if node is not None or value is not None:
                fail(where, f"output {i}", _EDGE, f"{node} where {value} is expected")
        else:
            expect(where, f"output {node.name}", _EDGE, value, node.meta["val"])


def verify_nodes(module: fx.GraphModule, where: str) -> None:
    """Check names, order, metadata and operators of a module's graph."""
    nodes = list(module.graph.nodes)
    all_nodes, made, names = set(nodes), set(), set()
    for node in nodes:
        if node.name in names:
            fail(where, node.name, "names are unique", "the name stands there twice")
        names.add(node.name)
        for source in node.all_input_nodes:
            if source not in all_nodes:
                found = f"it uses {source.name}, which is not in this graph"
                fail(where, node.name, "no reference dangles", found)
            if source not in made:
                found = f"it uses {source.name}, which stands after it"
                fail(where, node.name, "a value is made before it is used", found)
        made.add(node)
        _verify_node(module, node, where)
    if not nodes or nodes[-1].op != "output":
        fail(where, "output", "a graph ends with its output", "there is none")


def _verify_node(module: fx.GraphModule, node: fx.Node, where: str) -> None:
    if node.op == "get_attr":
        try:
            operator.attrgetter(str(node.target))(module)
        except AttributeError:
            fail(where, node.name, "no reference dangles", f"there is no attribute {node.target}")
        return
    if node.op == "output":
        return
    is_needed = bool(node.users) or node.op == "placeholder"
    if is_needed and call_of(node) is None and "val" not in node.meta:
        fail(where, node.name, "a node says what it makes", "it has no metadata value")
    if node.op != "call_function":
        return
    if is_in_place(node):
        found = f"{node.target} writes into {node.args[0] if node.args else 'an operand'}"
        fail(where, node.name, "no operator works in place", found)
    if is_collective(node) and not any(_waits(user) for user in node.users):
        rule = "each collective is waited for before its result is used"
        fail(where, node.name, rule, f"nothing waits for {node.target}")
    if is_collective(node):
        _verify_waits(node, where)


def _verify_waits(node: fx.Node, where: str) -> None:
    """Check that only waits use a collective, or parts of it that only waits use."""
    for user in node.users:
        is_part = user.target is operator.getitem
        users = user.users if is_part else [user]
        if culprit := next((x for x in users if not _waits(x)), None):
            rule = "each collective is waited for before its result is used"
            fail(where, culprit.name, rule, f"it uses {node.name} and does not wait for it")


def is_in_place(node: fx.Node) -> bool:
    """Say whether the node changes a value; `copy_` into an input updates it at the end."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    destination = node.args[0] if node.args else None
    is_update = target is torch.ops.aten.copy_.default and isinstance(destination, fx.Node)
    return not (is_update and destination.op == "placeholder")


def text_of(value: Value) -> str:
    """A value in a message or on a page: "float32[5, 6]", with strides unless contiguous."""
    if value.dtype is None:
        return "size"
    text = f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if value.stride != _contiguous(value.shape):
        text += f" strides ({', '.join(map(str, value.stride))})"
    return text if value.device == "cpu" else f"{text} on {value.device}"


def _contiguous(shape: Sequence[int | str]) -> tuple[int | str, ...] | None:
    if any(isinstance(size, str) for size in shape):
        return None
    strides: list[int | str] = []
    stride = 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(int(size), 1)
    return tuple(reversed(strides))


def _waits(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return any(_waits(user) for user in node.users)
    return is_wait(node)
