"""What a program changes besides what it returns, as TorchDynamo noted it while it read it.

A graph yields tensors and new values of buffers. What it would change elsewhere, a number that
counts or a list that grows, was read once, when it was made: `capture` refuses it.
"""

# pyright: basic
# (TorchDynamo is not typed.)

import re
from collections.abc import Iterator, Sequence
from functools import cached_property

from torch._dynamo.source import ClosureSource
from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew
from torch._dynamo.variables.misc import CellVariable, NewGlobalVariable
from torch._dynamo.variables.torch_function import TorchFunctionModeStackVariable
from torch._dynamo.variables.user_defined import UserDefinedObjectVariable

from plait.errors import GraphError
from plait.graph.breaks import code_of, own_frame, plain_name
from plait.graph.torch_release import name_of_source, stacks_of_changes

_MOST_NAMED = 4
_MODULE = re.compile(r"^__import_\w+\.")  # before the globals of other files


def refuse_side_effects(translator) -> None:
    """Raise GraphError if the program that was read up to here changes objects from outside."""
    found = list(dict.fromkeys(changes(translator)))
    if not found:
        return
    rest = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
    raise GraphError(
        f"the program changes {', '.join(found[:_MOST_NAMED])}{rest}, which a graph cannot keep. "
        "Do it outside of what is captured, or register a buffer and change that in place."
    )


def changes(translator) -> Iterator[str]:
    """What the program that was read up to here changes of objects from outside, in words."""
    side_effects = translator.output.side_effects
    for variable, *_ in side_effects.tensor_hooks.values():
        yield f"the hooks of {_name(variable.source, translator)}"
    stacks = stacks_of_changes(side_effects)
    for variable in side_effects._get_modified_vars():
        if isinstance(variable.mutation_type, AttributeMutationNew | ValueMutationNew):
            continue  # made by the program itself
        if variable.source is None or isinstance(variable, TorchFunctionModeStackVariable):
            continue  # that stack is as before when a `with` has ended
        place = _place(stacks.get(variable, ()))
        for what in _changed_in(variable, translator):
            yield _MODULE.sub("", what) + place


def _changed_in(variable, translator) -> Iterator[str]:
    """What of an object has changed, by the names that the user's code has for it."""
    given = translator.output.side_effects.store_attr_mutations.get(variable, {})
    name = _name(variable.source, translator)
    if isinstance(variable, CellVariable | NewGlobalVariable):
        yield name
    elif name.endswith("._buffers"):
        yield f"a buffer of {name.removesuffix('._buffers')}"
    elif given:
        kept = {key for key, value in given.items() if _is_as_before(variable, key, value)}
        yield from (f"{name}.{key}" for key in given if key not in kept)
    else:
        yield f"{name}, a {variable.python_type_name()}"


def _is_as_before(variable, name: str, value) -> bool:
    """Whether an attribute ends with the value that it had, or one that Python keeps for speed."""
    if not isinstance(variable, UserDefinedObjectVariable):
        return False
    if isinstance(getattr(type(variable.value), name, None), cached_property):
        return True
    if not value.is_python_constant() or not hasattr(variable.value, name):
        return False
    before, after = getattr(variable.value, name), value.as_python_constant()
    return before is after or (type(before) is type(after) and before == after)


def _place(stacks: Sequence) -> str:
    """The user's line where an object was changed last: " (file:line: `code`)"."""
    if not stacks or not stacks[-1]:
        return ""
    frame = own_frame(stacks[-1])
    code = code_of(frame)
    return f" ({frame.filename}:{frame.lineno}{f': `{code}`' if code else ''})"


def _name(source, translator) -> str:
    """The user's own name of an object, from TorchDynamo's source of it."""
    text = name_of_source(source)
    part = source
    while (inside := getattr(part, "base", None)) is not None:
        if isinstance(inside, ClosureSource):
            function = translator.output.resolve_source_value(inside.base)
            rest = text.removeprefix(name_of_source(part)).removeprefix(".cell_contents")
            return plain_name(function.__code__.co_freevars[part.index] + rest)
        part = inside
    return plain_name(text).removeprefix("self.")
