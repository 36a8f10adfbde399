"""Masks that are known before the program runs: those made of positions alone.

Models hand attention a mask that says what `is_causal` would say. Where nothing that it is made of
comes from outside, it is computed here once, on the CPU, and looked at.
"""

# pyright: basic
# (fx nodes are not typed.)

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from plait.graph.graph import FORWARD, Graph, Node, Template, call_of
from plait.graph.random_nodes import is_random

MAX_ELEMENTS = 1 << 26
"""Larger values are not computed: a mask of 8,192 tokens has as many."""


class ConstantMasks:
    """Says which masks of a graph's pieces let each token see itself and all before it, no more."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.root: dict[Node, Tensor | None] = {}
        # Calls that take the same known values share what is computed of them: a deep model has
        # one mask, not one for each layer. What is known stays in `root`, so its id stays its own.
        self.pieces: dict[tuple[str, tuple[int, ...]], dict[Node, Tensor | None]] = {}
        self.answers: dict[tuple[str, Node], bool] = {}
        self.calls: dict[str, list[Node]] = {}
        for node in graph.root.graph.nodes:
            called = call_of(node)
            if called is not None and called[1] == FORWARD:
                self.calls.setdefault(called[0], []).append(node)

    def is_causal(self, template: Template, mask: Node) -> bool:
        """Whether the mask, a node of the template's joint graph, is causal in every call."""
        key = (template.name, mask)
        if key not in self.answers:
            with _disable_current_modes(), torch.no_grad():
                values = {id(x): x for x in self._in_calls(template, mask)}
                self.answers[key] = all(x is not None and _is_causal(x) for x in values.values())
        return self.answers[key]

    def _in_calls(self, template: Template, mask: Node) -> list[Tensor | None]:
        return [self._in_piece(each, mask) for each in self.calls[template.name]]

    def _in_piece(self, forward: Node, node: Node) -> Tensor | None:
        """Value of a node of a piece, in one call of it."""
        template = self.graph.templates[str(forward.args[0])]
        values = [self._in_root(x) for x in forward.args[2:]]
        key = (template.name, tuple(map(id, values)))
        if key not in self.pieces:
            joint = template.joint or template.forward
            placeholders = joint.graph.find_nodes(op="placeholder")
            values += [None] * (len(placeholders) - len(values))  # gradients
            self.pieces[key] = dict(zip(placeholders, values, strict=True))
        return _evaluated(node, self.pieces[key])

    def _in_root(self, node: Any) -> Tensor | None:
        if node not in self.root:
            self.root[node] = None
            called = call_of(node.args[0]) if node.target is operator.getitem else None
            if called is not None and called[1] == FORWARD:
                template = self.graph.templates[called[0]]
                joint = template.joint or template.forward
                outputs: Any = joint.graph.output_node().args[0]
                if node.args[1] < len(template.results):
                    self.root[node] = self._in_piece(node.args[0], outputs[node.args[1]])
        return self.root[node]


def _evaluated(node: Node, values: dict[Node, Any]) -> Any:
    """Compute a node of what is known; None if something of it is not, or is too large."""
    if node not in values:
        values[node] = None
        if _can_be_computed(node):
            sources = {x: _evaluated(x, values) for x in node.all_input_nodes}
            if all(x is not None for x in sources.values()):
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda x: sources[x])  # type: ignore[misc]
                if "device" in kwargs:
                    kwargs = {**kwargs, "device": torch.device("cpu")}
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def _can_be_computed(node: Node) -> bool:
    """Whether it is an operator without side effects, random numbers or messages, and small."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return False
    value = node.meta.get("val")
    if node.target._schema.is_mutable or is_random(node) or not isinstance(value, Tensor):
        return False
    return math.prod(value.shape) <= MAX_ELEMENTS


def _is_causal(mask: Tensor) -> bool:
    """Of (..., T, T), bool or added to the scores: hidden is what is behind the diagonal."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    later = torch.ones(mask.shape[-2:], dtype=torch.bool).triu(1)
    if mask.dtype is torch.bool:
        return bool((mask == ~later).all())
    hidden = mask <= torch.finfo(mask.dtype).min
    return bool((hidden == later).all() and (mask[~hidden] == 0).all())
