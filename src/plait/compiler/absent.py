"""A backward without the gradients that do not arrive, as eager has none to add.

A program is traced with a gradient for each output, but a user may want that of the loss alone:
then zeros would arrive for logits or for the keys and values of a cache. They cost memory and time,
and a sum with them has their memory layout, not that of the only gradient that eager has. So what
is zero is followed through the operators that are linear in it, and sums with it are left out.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import cast

from plait.compiler.in_place import NOT_IN_PLACE
from plait.compiler.lower import with_frees
from plait.graph.schedule import (
    CALL,
    GETITEM,
    Argument,
    Program,
    Ref,
    Schedule,
    Step,
    map_refs,
    refs_in,
    resolve,
)

_LINEAR_IN_FIRST = {
    *("_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "clone", "contiguous"),
    *("detach", "diagonal", "div", "expand", "flip", "narrow", "neg", "permute", "repeat"),
    *("reshape", "roll", "select", "slice", "split", "split_with_sizes", "squeeze", "sum", "t"),
    *("transpose", "tril", "triu", "unbind", "unsqueeze", "view"),
}
_LINEAR_IN_EACH = {"bmm", "matmul", "mm", "mul"}


def without_gradients(
    schedule: Schedule, absent: Iterable[int]
) -> tuple[Schedule, tuple[int, ...]]:
    """The program `backward` if no gradient arrives at inputs of it, which are given by number.

    Returns a schedule of that program and its templates alone, and the numbers of the inputs that
    it still takes: an absent one among them is to be given as zeros.
    """
    variants = _Variants(schedule)
    made = variants.program("backward", frozenset(absent), None)
    programs = {"backward": made.program}
    rest = replace(schedule, programs=programs, templates=variants.called, loaded=None)
    return rest, made.takes


@dataclass(frozen=True)
class _Made:
    """takes: which inputs of the original are left. zeros: which of its results are zero."""

    program: Program
    takes: tuple[int, ...]
    zeros: frozenset[int]


_Key = tuple[str, frozenset[int], frozenset[int] | None]


@dataclass
class _Variants:
    """Programs of a schedule by which of their inputs are zero. called: those that are called."""

    schedule: Schedule
    made: dict[_Key, _Made] = field(default_factory=dict[_Key, _Made])
    called: dict[str, Program] = field(default_factory=dict[str, Program])

    def program(self, name: str, zeros: frozenset[int], wanted: frozenset[int] | None) -> _Made:
        """The program for such inputs. wanted: zero results that it returns; None means all."""
        key = (name, zeros, wanted)
        if key not in self.made:
            old = self.schedule.program(name)
            made = _Made(old, tuple(range(len(old.inputs))), frozenset())
            if zeros:
                made = _Variant(self, old, zeros).made(wanted)
            if zeros and name in self.schedule.templates:
                number = sum(each[0] == name for each in self.made) + 2
                made = replace(made, program=replace(made.program, name=f"{name}_{number}"))
            self.made[key] = made
        return self.made[key]


class _Variant:
    """One program, rewritten step by step. zero: values that are. parts: of tuples, which items.

    same: a sum with zero is its other term. shared: such terms, over which nothing may be written
    that the sum's memory was meant for. calls: with zeros, and which arguments they are.
    """

    def __init__(self, variants: _Variants, old: Program, zeros: frozenset[int]) -> None:
        self.variants = variants
        self.old = old
        self.zero = {old.inputs[i] for i in zeros}
        self.parts: dict[str, frozenset[int] | None] = {}
        self.same: dict[str, Argument] = {}
        self.shared: set[str] = set()
        self.calls: dict[str, frozenset[int]] = {}
        self.steps: list[Step] = []

    def made(self, wanted: frozenset[int] | None) -> _Made:
        """The program; its name is still the old one."""
        for step in self.old.steps:
            self.rewrite(step)
        renamed = [self.renamed(x) for x in self.old.results]
        zeros = frozenset(i for i, x in enumerate(renamed) if self.is_zero(x))
        left_out: frozenset[int] = zeros - wanted if wanted is not None else frozenset()
        results = tuple(None if i in left_out else x for i, x in enumerate(renamed))
        steps = with_frees(self.needed(results), results)
        used = {name for step in steps for name in refs_in((step.args, dict(step.kwargs)))}
        used.update(refs_in(results))
        # What is not zero stays an input though unused, so that calls need no change but for zeros.
        takes = tuple(
            i for i, name in enumerate(self.old.inputs) if name in used or name not in self.zero
        )
        inputs = tuple(self.old.inputs[i] for i in takes)
        program = replace(self.old, inputs=inputs, results=results, steps=steps)
        return _Made(program, takes, zeros)

    def renamed(self, x: Argument) -> Argument:
        return map_refs(x, lambda ref: self.same.get(ref.name, ref))

    def is_zero(self, x: Argument) -> bool:
        return isinstance(x, Ref) and x.name in self.zero

    def rewrite(self, step: Step) -> None:
        """Append the step, or leave it out."""
        args = tuple(self.renamed(x) for x in step.args)
        kwargs = tuple((key, self.renamed(x)) for key, x in step.kwargs)
        step = replace(step, args=args, kwargs=kwargs)
        names = [x.name if isinstance(x, Ref) else "" for x in step.args]
        zeros = [i for i, name in enumerate(names) if name in self.zero]
        if step.target == GETITEM:
            self.note_part(step)
        elif step.target.startswith(CALL):
            self.calls[step.name] = frozenset(zeros)
            self.parts[step.name] = self.called(step, frozenset()).zeros
        elif zeros and step.name in self.old.sums:
            if len(zeros) == 1:
                self.same[step.name] = step.args[1 - zeros[0]]
                self.shared.add(names[1 - zeros[0]])
                return
            self.zero.add(step.name)
        elif zeros and _is_linear_in(step.target, zeros):
            self.zero.add(step.name)
            self.parts[step.name] = None
        if names and names[0] in self.shared:
            step = replace(step, target=NOT_IN_PLACE.get(step.target, step.target))
            if _base(step.target) == "_unsafe_view":
                self.shared.add(step.name)
        self.steps.append(step)

    def note_part(self, step: Step) -> None:
        """An item of a tuple is zero if all of it is, or that one."""
        whole, number = step.args
        if isinstance(whole, Ref) and whole.name in self.parts:
            zeros = self.parts[whole.name]
            if zeros is None or number in zeros:
                self.zero.add(step.name)

    def called(self, step: Step, wanted: frozenset[int]) -> _Made:
        """The template's program for the arguments of the call."""
        name = step.target.removeprefix(CALL)
        return self.variants.program(name, self.calls[step.name], wanted)

    def needed(self, results: tuple[Argument, ...]) -> list[Step]:
        """The steps without those that compute a zero of which nobody needs the memory."""
        wanted = set(refs_in(results))
        items: dict[str, set[int]] = {}
        kept: list[Step] = []
        for step in reversed(self.steps):
            all_zero = self.parts.get(step.name, frozenset()) is None
            if (step.name in self.zero or all_zero) and step.name not in wanted:
                continue
            if step.name in self.zero and step.target == GETITEM:
                (whole,) = refs_in(step.args)
                items.setdefault(whole, set()).add(cast("int", step.args[1]))
            if step.name in self.calls:
                made = self.called(step, frozenset(items.get(step.name, ())))
                self.variants.called[made.program.name] = made.program
                args = tuple(step.args[i] for i in made.takes)
                step = replace(step, target=CALL + made.program.name, args=args)
            kept.append(step)
            wanted.update(refs_in((step.args, dict(step.kwargs))))
        return kept[::-1]


@cache
def _base(target: str) -> str:
    """The operator's name without namespace, overload and the mark of writing in place."""
    namespace, _, rest = target.partition(".")
    return rest.partition(".")[0].removesuffix("_") if namespace == "aten" else ""


def _is_linear_in(target: str, zeros: list[int]) -> bool:
    """Whether the result is zero if these arguments are."""
    base = _base(target)
    if base in _LINEAR_IN_EACH:
        return True
    if zeros[0] != 0:
        return False
    return base in _LINEAR_IN_FIRST or (base != "" and _takes_gradient(target))


@cache
def _takes_gradient(target: str) -> bool:
    """Whether it is a formula of a derivative: linear in the gradient, its first argument."""
    schema = getattr(resolve(target), "_schema", None)
    return (
        "backward" in target
        and schema is not None
        and bool(schema.arguments)
        and schema.arguments[0].name.startswith("grad")
    )
