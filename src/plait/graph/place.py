"""Where a step stands in a schedule: in which program, and in which call of which template.

A template's steps run once for each call. So its step is one thing, and each time it runs another:
that is a `Place`, whatever looks at it (a profile, a debugger, a price).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from plait.graph.schedule import CALL, CONSTANT, GETITEM, Program, Schedule, Step


@dataclass(frozen=True, kw_only=True)
class Call:
    """Call `number` (from 1) of `num_calls` of a template's program in the program that calls."""

    step: str
    template: str
    number: int
    num_calls: int

    def __str__(self) -> str:
        """As in "call 2 of 3 of Block_1.forward"."""
        return f"call {self.number} of {self.num_calls} of {self.template}"


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


def call_made_by(step: Step, program: Program) -> Call:
    """Describe the call that a step of this program makes."""
    same = [each.name for each in program.steps if each.target == step.target]
    return Call(
        step=step.name,
        template=step.target.removeprefix(CALL),
        number=same.index(step.name) + 1,
        num_calls=len(same),
    )


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
            call = call_made_by(step, program)
            inner = schedule.program(call.template)
            yield from _walk(schedule, inner, outermost, (*calls, call))
