"""Rules of the calls in a root graph: what they name, take, yield and have saved."""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOptionalMemberAccess=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false, reportOptionalIterable=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false
# (Arguments of fx nodes are not typed.)

import operator
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from plait.graph.graph import BACKWARD, FORWARD, Graph, Role, Template, Value, call_of, describe
from plait.graph.verify_nodes import expect, fail, text_of

_ROOT = "the root"
_TANGENTS = "a tangent has the shape and dtype of what it belongs to"
_OPERANDS = "the operands of a call are what its template takes"
_TAKEN = "what is taken from a call is what its template yields"
_SAVED = "a backward takes what one forward of its template saved, in order"


def verify_calls(graph: Graph) -> None:
    """Check each call: its template, its operands, what is taken from it, and what it saved."""
    for node in graph.root.graph.nodes:
        if (called := call_of(node)) is not None:
            _verify_call(graph, node, *called)


def tangents_of(template: Template) -> list[Value]:
    """What arrives at the backward of a template, after what it saved.

    The strides of a gradient are those that its maker gives it, not those of the result.
    """
    owners = [template.results[i] for i in template.differentiable]
    owners += [template.arguments[i] for i in template.threaded]
    assert template.backward is not None
    places = template.backward.graph.find_nodes(op="placeholder")[len(template.saved) :]
    where = f"template {template.name}, {BACKWARD}"
    if len(places) != len(owners):
        found = f"{len(places)} tangents arrive, and {len(owners)} are described"
        fail(where, "tangents", _TANGENTS, found)
    tangents = []
    for place, owner in zip(places, owners, strict=True):
        tangent = describe(Role.TANGENT, owner.name, place.meta["val"])
        if tangent.shape != owner.shape or tangent.dtype != owner.dtype:
            found = f"{text_of(tangent)} for {text_of(owner)}"
            fail(where, place.name, _TANGENTS, found)
        tangents.append(replace(tangent, layout=owner.layout))
    return tangents


def _verify_call(graph: Graph, node: fx.Node, name: str, part: str) -> None:
    template = graph.templates.get(name)
    if template is None:
        fail(_ROOT, node.name, "a call names a known template", f"there is no template {name}")
    has_part = part == FORWARD or (part == BACKWARD and template.backward is not None)
    if not has_part:
        fail(_ROOT, node.name, "a call names a part of its template", f"{name} has no {part}")
    if part == FORWARD:
        takes = list(template.arguments)
    else:
        takes = [*template.saved, *tangents_of(template)]
    operands = node.args[2:]
    if len(operands) != len(takes):
        found = f"{name} takes {len(takes)} operands for its {part}, and here are {len(operands)}"
        fail(_ROOT, node.name, _OPERANDS, found)
    for i, (operand, value) in enumerate(zip(operands, takes, strict=True)):
        if value.dtype is None and isinstance(operand, float):
            continue  # a number in which layers differ
        if not isinstance(operand, fx.Node) or "val" not in operand.meta:
            fail(_ROOT, node.name, _OPERANDS, f"operand {i} is {operand}, not a value")
        place = f"{node.name}, operand {i} ({operand.name})"
        expect(_ROOT, place, _OPERANDS, value, operand.meta["val"])
    _verify_taken(node, template.yields(part))
    if part == BACKWARD:
        _verify_saved(node, template)


def _verify_taken(node: fx.Node, yields: Sequence[Value]) -> None:
    for user in node.users:
        if user.target is not operator.getitem:
            fail(_ROOT, user.name, _TAKEN, f"it uses {node.name} as a whole")
        number = user.args[1]
        if not isinstance(number, int) or not 0 <= number < len(yields):
            found = f"{node.name} yields {len(yields)} values, and number {number} is taken"
            fail(_ROOT, user.name, _TAKEN, found)
        expect(_ROOT, user.name, _TAKEN, yields[number], user.meta["val"])


def _verify_saved(node: fx.Node, template: Template) -> None:
    """Layers of one kind look alike: that a backward takes its own layer's values is seen here."""
    operands = list(zip(node.args[2:], template.saved, strict=False))
    source: fx.Node | None = None
    number = len(template.results)
    for operand, value in operands:
        if value in template.computed_saved:
            made_by = operand.args[0] if operand.target is operator.getitem else operand
            if call_of(made_by) != (template.name, FORWARD) or operand.args[1] != number:
                found = f"{operand.name} is not what a forward of {template.name} saved as"
                fail(_ROOT, node.name, _SAVED, f"{found} {value.name}")
            if source not in (None, made_by):
                found = f"{operand.name} comes from {made_by.name}, others from {source.name}"
                fail(_ROOT, node.name, _SAVED, found)
            source, number = made_by, number + 1
    for operand, value in operands:
        if source is None or value in template.computed_saved:
            continue
        given = source.args[2 + int(value.name)]
        if given is not operand:
            found = f"{operand.name} where {source.name} took {given.name}"
            fail(_ROOT, node.name, _SAVED, found)
