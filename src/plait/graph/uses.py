"""One input for each use of what an earlier program made.

Autograd adds the gradients of a tensor from its last user to its first. Where a graph breaks, the
users of an activation lie in several programs: its norm before the break, its residual connection
behind. The program before the break must not add up its own share first, or the sum has another
order than eager's. So it takes the activation once for each use, and autograd adds.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from plait.graph.compose import storage_of

_WRITING = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv}


def part_uses(module: fx.GraphModule) -> list[int]:
    """Part inputs other than parameters; return the number of the input that each new one repeats.

    The new inputs come last, in the order in which autograd is to add their gradients. What is
    changed in place is not parted, as all parts would have to change, nor what a result is a view
    of, nor what an operator or a block takes that uses it more than once inside.
    """
    inputs = module.graph.find_nodes(op="placeholder")
    parting = _Parting(module.graph, inputs)
    kept = _storages(module.graph.output_node().all_input_nodes)
    for node in module.graph.nodes:
        if _writes(node):
            kept |= _storages(node.all_input_nodes)
    for number, node in enumerate(inputs):
        example = node.meta.get("example_value")
        if _is_activation(example) and storage_of(example) not in kept:
            parting.part(number, node)
    return parting.repeated


class _Parting:
    def __init__(self, graph: fx.Graph, inputs: list[fx.Node]) -> None:
        self.graph = graph
        self.last = inputs[-1] if inputs else None
        self.repeated: list[int] = []

    def part(self, number: int, node: fx.Node) -> None:
        """Give each use an input of its own; the last one keeps the old."""
        users = self.users(node)
        if sum(_count(node, user) for user in users) != self.num_terms(node):
            return
        is_first = True

        def parted(operand: fx.Node) -> fx.Node:
            nonlocal is_first
            if operand is not node:
                return operand
            if is_first:
                is_first = False
                return node
            return self.again(number, node)

        for user in reversed(users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), parted)

    def users(self, node: fx.Node) -> list[fx.Node]:
        """In order. What only hands the tensor on, as `x.float()` may, is taken out."""
        example = node.meta["example_value"]
        for user in list(node.users):
            if user.meta.get("example_value") is example:
                user.replace_all_uses_with(node)
                self.graph.erase_node(user)
                return self.users(node)
        return [x for x in self.graph.nodes if x in node.users and _is_differentiable(x)]

    def num_terms(self, node: fx.Node) -> int:
        """Of how many terms autograd makes the gradient: the edges that end at the tensor."""
        with torch.enable_grad():
            clone: Any = node.meta["example_value"].clone().grad_fn
        end = clone.next_functions[0][0]
        found = [tree_leaves(each.meta.get("example_value")) for each in self.graph.nodes]
        ahead = [x.grad_fn for values in found for x in values if isinstance(x, Tensor)]
        seen = {end}
        count = 0
        while ahead:
            function = ahead.pop()
            if function is None or function in seen:
                continue
            seen.add(function)
            for before, _ in function.next_functions:
                count += before is end
                ahead.append(before)
        return count

    def again(self, number: int, node: fx.Node) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.placeholder(f"{node.name}_again")
        self.last.meta = dict(node.meta)
        self.last._dynamo_source = None  # AOTAutograd's word for a value that is not the user's
        self.repeated.append(number)
        return self.last


def unite_uses(module: fx.GraphModule, repeated: list[int]) -> None:
    """Undo `part_uses`."""
    inputs = module.graph.find_nodes(op="placeholder")
    for node, number in zip(inputs[len(inputs) - len(repeated) :], repeated, strict=True):
        node.replace_all_uses_with(inputs[number])
        module.graph.erase_node(node)


def _count(node: fx.Node, user: fx.Node) -> int:
    """How often the user takes it."""
    return sum(x is node for x in tree_leaves((user.args, user.kwargs)))


def _storages(nodes: Iterable[fx.Node]) -> set[int]:
    values = [node.meta.get("example_value") for node in nodes]
    return {storage_of(x) for x in values if isinstance(x, Tensor)}


def _is_activation(example: object) -> bool:
    # A leaf counts: the graph may run again on what an earlier program made.
    is_parameter = isinstance(example, nn.Parameter)
    return isinstance(example, Tensor) and example.requires_grad and not is_parameter


def _is_differentiable(user: fx.Node) -> bool:
    values = tree_leaves(user.meta.get("example_value"))
    return user.op != "output" and any(isinstance(x, Tensor) and x.requires_grad for x in values)


def _writes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return node.target in _WRITING or name.endswith("_") or "out" in node.kwargs
