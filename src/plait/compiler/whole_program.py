"""Level O2: each program of a step as one graph for TorchInductor, with its `max-autotune`.

Inductor orders what it is given anew. Where an order must be kept (collectives, random draws,
writes into memory), the programs stay as they are and get islands as at O1, with a note that says
why.
"""

# pyright: basic
# (fx nodes are not typed.)

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from plait.compiler.fuse import cut_out, fuse
from plait.compiler.fusible import writes
from plait.graph.collectives import is_collective, is_wait
from plait.graph.graph import BACKWARD, Graph, Module, Node, call_of, module_of
from plait.graph.island import Island, island
from plait.graph.note import Note
from plait.graph.random_nodes import is_random
from plait.plan.parallel_plan import ParallelPlan

MAX_AUTOTUNE = "max-autotune"
_BY = "whole programs"
_SPLIT = "a split backward is two programs that share blocks; the programs run at O1"


def whole_programs(graph: Graph, plan: ParallelPlan) -> Graph:
    """Mark a graph whose programs may become one island each; give any other islands."""
    reasons = {
        reason: node
        for module in _modules(graph)
        for node in module.graph.nodes
        if (reason := _reason(node))
    }
    if plan.split_backward:
        reasons[_SPLIT] = graph.root.graph.output_node()
    if not reasons:
        return replace(graph.copy(), is_whole=True)
    graph = fuse(graph)
    notes = tuple(
        Note(by=_BY, operator=str(node.target), node=node.name, text=reason, is_refusal=True)
        for reason, node in reasons.items()
    )
    graph.notes = (*graph.notes, *notes)
    return graph


def _modules(graph: Graph) -> list[Module]:
    parts = [(each.forward, each.backward) for each in graph.templates.values()]
    return [graph.root, *(module for pair in parts for module in pair if module is not None)]


def _reason(node: Node) -> str:
    if is_collective(node) or is_wait(node):
        return "collectives keep their order; the programs run at O1"
    if is_random(node):
        return "random draws keep their order; the programs run at O1"
    if writes(node):
        return "writes into memory keep their order; the programs run at O1"
    is_known = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
    if node.op == "call_function" and call_of(node) is None and not is_known:
        return "Inductor is given operators only; the programs run at O1"
    return ""


def as_one_island(module: Module, graph: Graph, islands: dict[str, Island]) -> Module:
    """A program that is one island, of its root module with every call inlined."""
    flat = inlined(module, graph)
    nodes = list(flat.graph.nodes)
    members = [node for node in nodes if node.op == "call_function"]
    operands = [node for node in nodes if node.op in ("placeholder", "get_attr")]
    (outputs,) = flat.graph.output_node().args
    seen = [x for x in dict.fromkeys(outputs) if isinstance(x, fx.Node) and x in set(members)]
    if not seen:
        return flat
    found = replace(cut_out(members, operands, seen), mode=MAX_AUTOTUNE)
    islands[found.name] = found
    written = fx.Graph()
    copies: dict[Node, Node] = {node: written.node_copy(node) for node in operands}
    args = (found.name, *(copies[x] for x in operands))
    whole: Any = written.call_function(island, args)
    for i, node in enumerate(seen):
        copies[node] = written.call_function(operator.getitem, (whole, i))
        copies[node].meta = dict(node.meta)
    written.output(fx.map_arg(outputs, lambda x: copies[x]))
    return module_of(flat, written)


def inlined(module: Module, graph: Graph) -> Module:
    """The module with the operators of templates in place of calls."""
    flat = fx.Graph()
    copies: dict[Node, Any] = {}
    owner = torch.nn.Module()

    def write(node: Node, known: dict[Node, Any], home: Module) -> Any:
        copy: Any = flat.node_copy(node, lambda x: known[x])
        if node.op == "get_attr":
            copy.target = f"constant_{len(list(owner.named_buffers()))}"
            owner.register_buffer(copy.target, operator.attrgetter(node.target)(home))
        return copy

    for node in module.graph.nodes:
        called = call_of(node)
        if node.op == "output":
            break
        if node.target is operator.getitem and isinstance(copies[node.args[0]], tuple):
            copies[node] = copies[node.args[0]][node.args[1]]
        elif called is None:
            copies[node] = write(node, copies, module)
        else:
            template = graph.templates[called[0]]
            part: Any = template.backward if called[1] == BACKWARD else template.forward
            operands = (copies[x] if isinstance(x, fx.Node) else x for x in node.args[2:])
            inner = dict(zip(part.graph.find_nodes(op="placeholder"), operands, strict=True))
            for each in part.graph.nodes:
                if each.op in ("call_function", "get_attr"):
                    inner[each] = write(each, inner, part)
            (results,) = part.graph.output_node().args
            copies[node] = tuple(inner[x] if isinstance(x, fx.Node) else x for x in results)
    (outputs,) = module.graph.output_node().args
    flat.output(fx.map_arg(outputs, lambda x: copies[x]))
    return module_of(owner, flat)
