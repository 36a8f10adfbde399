"""An fx graph becomes a `Program`: operators by name, and what each step frees."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from plait.compiler.assemble import assemble
from plait.compiler.in_place import in_place, is_sum
from plait.graph.graph import BACKWARD, FORWARD, Template, call_of
from plait.graph.island import Island, island_of
from plait.graph.schedule import (
    CALL,
    CONSTANT,
    ISLAND,
    OBJECT,
    Argument,
    IslandProgram,
    Program,
    Ref,
    Step,
    name_of,
    refs_in,
)
from plait.graph.source import source_of


@dataclass
class Lowering:
    """Programs of one schedule, and the constants and objects that they share."""

    constants: dict[str, Tensor] = field(default_factory=dict)
    objects: dict[str, Callable] = field(default_factory=dict)
    islands: dict[str, IslandProgram] = field(default_factory=dict)

    def island(self, island: Island) -> None:
        """Lower an island, once."""
        if island.name not in self.islands:
            # Written over nothing: Inductor finds by itself which memory it may use again.
            program = self.program(island.name, island.module, overwrites=False)
            self.islands[island.name] = IslandProgram(
                program=program, takes=island.takes, mode=island.mode
            )

    def program(self, name: str, module: fx.GraphModule, *, overwrites: bool = True) -> Program:
        """Lower a module of operators and calls; its outputs become the results.

        overwrites: operators write over operands that die there.
        """
        inputs: list[str] = []
        steps: list[Step] = []
        results: tuple[Argument, ...] = ()
        module = assemble(module)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                inputs.append(node.name)
            elif node.op == "output":
                (outputs,) = node.args
                results = tuple(_argument(x) for x in outputs)
            elif node.op == "get_attr":
                steps.append(self._attribute(module, node))
            else:
                steps.append(self._step(node, overwrites))
        return Program(
            name=name,
            inputs=tuple(inputs),
            results=results,
            steps=with_frees(steps, results),
            sums=frozenset(node.name for node in module.graph.nodes if is_sum(node)),
        )

    def template(self, template: Template) -> dict[str, Program]:
        """Programs of a template, by the names under which calls find them."""
        parts = {FORWARD: template.forward, BACKWARD: template.backward}
        return {
            name: self.program(name, module)
            for part, module in parts.items()
            if module is not None
            for name in [program_name(template.name, part)]
        }

    def _step(self, node: fx.Node, overwrites: bool) -> Step:
        call, island = call_of(node), island_of(node)
        if island is not None:
            target, args = ISLAND + island, node.args[1:]
        elif call is not None:
            target, args = CALL + program_name(*call), node.args[2:]
        else:
            chosen, args = in_place(node) if overwrites else (node.target, node.args)
            target = name_of(chosen) or self._object(chosen)
        return Step(
            name=node.name,
            target=target,
            args=tuple(_argument(x) for x in args),
            kwargs=tuple((key, _argument(x)) for key, x in node.kwargs.items()),
            source=source_of(node),
        )

    def _object(self, target: object) -> str:
        assert callable(target)
        for name, known in self.objects.items():
            if known is target:
                return OBJECT + name
        name = f"{getattr(target, '__name__', 'object')}_{len(self.objects)}"
        self.objects[name] = target
        return OBJECT + name

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Step:
        value: object = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, Tensor):
            for name, known in self.constants.items():
                if known is value:
                    return Step(name=node.name, target=CONSTANT, args=(name,))
            name = f"constant_{len(self.constants)}"
            self.constants[name] = value
            return Step(name=node.name, target=CONSTANT, args=(name,))
        # A module under a higher-order operator of torch (cond, flex attention): kept as it is.
        name = f"module_{len(self.objects)}"
        self.objects[name] = lambda: value
        return Step(name=node.name, target=OBJECT + name)


def program_name(template: str, part: str) -> str:
    """Name of a template's program."""
    return f"{template}.{part}"


def _argument(x: object) -> Argument:
    if isinstance(x, fx.Node):
        return Ref(x.name)
    if isinstance(x, list):
        return [_argument(item) for item in x]
    if isinstance(x, tuple):
        return tuple(_argument(item) for item in x)
    if isinstance(x, Mapping):
        return {key: _argument(item) for key, item in x.items()}
    if isinstance(x, slice):
        return slice(_argument(x.start), _argument(x.stop), _argument(x.step))
    if isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool):
        message = f"a symbolic constant ({x}) reached a program"
        raise AssertionError(message)
    return x


def with_frees(steps: list[Step], results: tuple[Argument, ...]) -> tuple[Step, ...]:
    """Note at each step which values are used there for the last time."""
    needed = set(refs_in(results))
    last_first: list[Step] = []
    for step in reversed(steps):
        used = dict.fromkeys(refs_in((step.args, dict(step.kwargs))))
        frees = [name for name in used if name not in needed]
        if step.name not in needed and step.name not in frees:
            frees.append(step.name)
        needed.update(used)
        last_first.append(
            Step(
                name=step.name,
                target=step.target,
                args=step.args,
                kwargs=step.kwargs,
                frees=tuple(frees),
                source=step.source,
            )
        )
    return tuple(reversed(last_first))
