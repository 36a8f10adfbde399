"""Where a step stands in a schedule: in which program, and in which call of which template.

A template's steps run once for each call. So its step is one thing, and each time it runs another:
that is a `Place`, whatever looks at it (a profile, a debugger, a price).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from plait.graph.schedule import CALL, CONSTANT, GETITEM, Program, Schedule, Step, refs_in

_MEMBER = re.compile("_(?:modules|parameters|buffers)_")


@dataclass(frozen=True, kw_only=True)
class Call:
    """Call `number` (from 1) of `num_calls` of a template's program in the program that calls.

    layer: the user's layer whose parameters it takes ("blocks.1"), or "".
    """

    step: str
    template: str
    number: int
    num_calls: int
    layer: str = ""

    def __str__(self) -> str:
        """As in "call 2 of 3 of Block_1.forward (blocks.1)"."""
        layer = f" ({self.layer})" if self.layer else ""
        return f"call {self.number} of {self.num_calls} of {self.template}{layer}"


@dataclass(frozen=True, kw_only=True)
class Place:
    """One running of a step. program: the outermost one. calls: from outermost to innermost."""

    program: str
    step: Step
    calls: tuple[Call, ...] = ()

    @property
    def name(self) -> str:
        """As in "forward/block_1_forward_1/addmm"; the name of a place is its own."""
        return "/".join((self.program, *(call.step for call in self.calls), self.step.name))

    @property
    def where(self) -> str:
        """In words: "call 2 of 3 of Block_1.forward, in the program forward"."""
        calls = [str(call) for call in reversed(self.calls)]
        return ", in ".join((*calls, f"the program {self.program}"))

    @property
    def is_operator(self) -> bool:
        """Whether it computes something itself: not a call, and not only a name for a part."""
        target = self.step.target
        return target not in (GETITEM, CONSTANT) and not target.startswith(CALL)


def call_made_by(
    step: Step, program: Program, schedule: Schedule, known: Mapping[str, str] | None = None
) -> Call:
    """Describe the call that a step of this program makes."""
    same = [each.name for each in program.steps if each.target == step.target]
    known = input_names(schedule) if known is None else known
    taken = [known[name].split(".") for name in refs_in(step.args) if "." in known.get(name, "")]
    return Call(
        step=step.name,
        template=step.target.removeprefix(CALL),
        number=same.index(step.name) + 1,
        num_calls=len(same),
        layer=".".join(_common_start([path[:-1] for path in taken])),
    )


def input_names(schedule: Schedule) -> dict[str, str]:
    """The user's names of the inputs of the programs, parameters as in "blocks.1.norm.weight"."""
    forward = schedule.programs.get("forward")
    if forward is None:
        return {}
    return {
        name: _dotted(value.name)
        for name, value in zip(forward.inputs, schedule.inputs, strict=False)
    }


def walk(schedule: Schedule) -> Iterator[Place]:
    """Yield every place in the order in which it begins: calls come before their own steps."""
    for program in schedule.programs.values():
        yield from _walk(schedule, program, program.name, ())


def _walk(
    schedule: Schedule, program: Program, outermost: str, calls: tuple[Call, ...]
) -> Iterator[Place]:
    for step in program.steps:
        yield Place(program=outermost, calls=calls, step=step)
        if step.target.startswith(CALL):
            call = call_made_by(step, program, schedule)
            inner = schedule.program(call.template)
            yield from _walk(schedule, inner, outermost, (*calls, call))


def _dotted(name: str) -> str:
    """TorchDynamo's "l_self_modules_blocks_modules_1_parameters_weight_" as "blocks.1.weight"."""
    parts = _MEMBER.split(name.removesuffix("_"))
    return ".".join(parts[1:]) if len(parts) > 1 else name


def _common_start(paths: Sequence[Sequence[str]]) -> list[str]:
    start: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        start.append(parts[0])
    return start
