"""The hierarchical graph: one root of calls, and a template for each kind of repeated block.

A deep model repeats a few kinds of layer. Each kind is captured once, as a `Template`; the root
holds a `call` node for each time it runs, so that capture and passes cost one layer, not eighty.
Forward and backward stand in one graph (a *joint* graph) until the compiler parts them.
"""

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import (
    _LazyGraphModule,  # pyright: ignore[reportPrivateUsage]
)

from plait.graph.note import Note

Node = Any
"""An fx.Node. Its arguments may be of any type, and a checker would ask for each at every use."""
Module = Any
"""An fx.GraphModule, whose nodes are such."""


class Role(Enum):
    """What a value at the edge of a graph is."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    TANGENT = "tangent"  # gradient that arrives for an output
    OUTPUT = "output"
    GRADIENT = "gradient"
    UPDATE = "update"  # new value of a buffer or an input that the program changes
    STATE = "state"  # of the optimizer, and its learning rates
    SAVED = "saved"  # kept from the forward for the backward


@dataclass(frozen=True)
class Full:
    """Every replica needs, and has, the whole value."""


@dataclass(frozen=True)
class Shard:
    """Replicas hold equal parts along `dim`."""

    dim: int


@dataclass(frozen=True)
class Split:
    """Replicas hold parts of these sizes along `dim`."""

    dim: int
    sizes: tuple[int, ...]


Layout = Full | Shard | Split


@dataclass(frozen=True, kw_only=True)
class Value:
    """A value at the edge of a graph or template.

    `name` is the dotted name of a parameter or buffer, else the position in its role. A gradient
    has the name of what it is the gradient of.
    """

    role: Role
    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None  # None: a size
    device: str = "cpu"
    layout: Layout = field(default_factory=Full)

    @property
    def num_bytes(self) -> int:
        """Size of a contiguous copy."""
        return math.prod(self.shape) * (self.dtype.itemsize if self.dtype else 0)


@dataclass
class Template:
    """One kind of block, captured once.

    joint: arguments, then tangents -> results, then one gradient for each argument (or None).
    forward: arguments -> results, then the computed ones of `saved`.
    backward: `saved`, then tangents -> those of `gradients` that are not None.
    A template without gradients has neither joint nor backward.

    saved: what the backward needs; an INPUT among them is the argument of that number.
    differentiable: the results that take a tangent; their tangents come first, then `threaded`'s.
    threaded: arguments that other nodes use too. A call hands them through to the later users, and
    adds its own part to the gradient that comes back from them. So the uses of a value are summed
    in autograd's own order (later users first), and the sum keeps its bits.
    """

    name: str
    block: str  # the class it was captured from
    arguments: tuple[Value, ...]
    results: tuple[Value, ...]
    forward: fx.GraphModule
    joint: fx.GraphModule | None = None
    backward: fx.GraphModule | None = None
    saved: tuple[Value, ...] = ()
    gradients: tuple[Value | None, ...] = ()
    differentiable: tuple[int, ...] = ()
    threaded: tuple[int, ...] = ()

    @property
    def computed_saved(self) -> tuple[Value, ...]:
        """The saved values that are not arguments: what the forward yields after its results."""
        return tuple(value for value in self.saved if value.role is Role.SAVED)

    def yields(self, part: str) -> tuple[Value, ...]:
        """What a call of this part yields."""
        if part == FORWARD:
            return self.results + self.computed_saved
        return tuple(value for value in self.gradients if value is not None)


@dataclass(frozen=True)
class Group:
    """Ranks that communicate along an axis of the mesh, and which of them this one is."""

    size: int
    rank: int


@dataclass
class Graph:
    """One rank's program. `root` is joint: forward nodes, then backward nodes, calls among them."""

    root: fx.GraphModule
    templates: dict[str, Template]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    num_forward_outputs: int
    is_step: bool = False  # captured with its loss: running it is a step of training
    groups: dict[str, Group] = field(default_factory=dict[str, Group])  # by the axis they name
    certificates: dict[str, str] = field(
        default_factory=dict[str, str]
    )  # what was proven, by piece
    notes: tuple[Note, ...] = ()  # what passes did, and what they could not do
    islands: dict[str, Any] = field(default_factory=dict[str, Any])  # see `graph/island.py`
    is_whole: bool = False  # each program is to be one island
    is_strict: bool = False  # a row's result does not depend on the other rows
    arguments: tuple[str, ...] | None = None  # what was captured: see `describe_argument`

    def values(self, role: Role) -> list[Value]:
        """Inputs or outputs in this role, in order."""
        return [value for value in (*self.inputs, *self.outputs) if value.role is role]

    def copy(self) -> "Graph":
        """A graph whose root and templates can be changed without changing this one."""
        templates = {
            name: replace(
                template,
                forward=copied(template.forward),
                joint=None if template.joint is None else copied(template.joint),
                backward=None if template.backward is None else copied(template.backward),
            )
            for name, template in self.templates.items()
        }
        return replace(self, root=copied(self.root), templates=templates)

    def num_operators(self) -> int:
        """Count operators as if every call were inlined."""
        count = 0
        for node in self.root.graph.nodes:
            call = call_of(node)
            if call is None:
                count += node.op == "call_function"
                continue
            template = self.templates[call[0]]
            part = template.forward if call[1] == FORWARD else template.backward
            assert part is not None
            count += sum(each.op == "call_function" for each in part.graph.nodes)
        return count


def module_of(owner: Any, graph: fx.Graph) -> fx.GraphModule:
    """A module of a graph with the attributes of `owner`; its Python code is written when needed.

    fx writes the code of every graph at once, which takes longer than most passes.
    """
    return _LazyGraphModule(owner, graph)


FORWARD = "forward"
BACKWARD = "backward"


def call(template: str, part: str, *operands: object) -> tuple[object, ...]:
    """Stand in a root graph for running a template; the executor runs the template's program."""
    raise AssertionError(f"the call of {template} ({part}) stands in a graph only")


def call_of(node: fx.Node) -> tuple[str, str] | None:
    """(template name, FORWARD or BACKWARD) if the node calls a template, else None."""
    if node.op == "call_function" and node.target is call:
        return str(node.args[0]), str(node.args[1])
    return None


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A module that can be changed without changing this one."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for node in graph.nodes:
        if "forward" in node.meta:  # a backward call knows its forward
            node.meta["forward"] = copies[node.meta["forward"]]
    return module_of(module, graph)


TENSOR = "a tensor"


def describe_argument(x: object) -> str:
    """Say what an argument of a program is: a tensor, or a plain value, which is part of it."""
    if isinstance(x, Tensor):
        return TENSOR
    is_plain = x is None or isinstance(x, bool | int | float | complex | str)
    return repr(x) if is_plain else f"a {type(x).__name__}"


def describe(role: Role, name: str, value: object) -> Value:
    """Make the `Value` of a (fake) tensor or a size, or copy one in another role."""
    if isinstance(value, Value):
        return replace(value, role=role, name=name)
    if not isinstance(value, Tensor):
        return Value(role=role, name=name, shape=(), stride=(), dtype=None)
    return Value(
        role=role,
        name=name,
        shape=tuple(value.shape),
        stride=tuple(value.stride()),
        dtype=value.dtype,
        device=str(value.device),
    )
