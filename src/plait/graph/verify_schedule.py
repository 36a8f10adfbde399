"""What must hold in a schedule before it runs: every value is there when it is needed."""

from plait.errors import GraphError
from plait.graph.graph import Role
from plait.graph.schedule import (
    CALL,
    CONSTANT,
    ISLAND,
    OBJECT,
    Program,
    Schedule,
    Step,
    refs_in,
    resolve,
)
from plait.graph.verify_nodes import fail


def verify_schedule(schedule: Schedule) -> None:
    """Check every program. Raises GraphError, naming program, step and rule, at the first fault."""
    islands = {name: island.program for name, island in schedule.islands.items()}
    for programs in (islands, schedule.templates, schedule.programs):
        for name, program in programs.items():
            if name != program.name:
                rule = "a program is known by its name"
                fail(f"program {name}", "name", rule, f"it is called {program.name}")
            _verify_program(schedule, program)
    _verify_edges(schedule)


def _verify_program(schedule: Schedule, program: Program) -> None:
    where = f"program {program.name}"
    alive = set(program.inputs)
    seen = set(program.inputs)
    if len(seen) < len(program.inputs):
        fail(where, "inputs", "names are unique", "two inputs have one name")
    for step in program.steps:
        if step.name in seen:
            fail(where, step.name, "names are unique", "the name stands there twice")
        for name in refs_in((step.args, dict(step.kwargs))):
            _verify_alive(where, step.name, name, alive, seen)
        seen.add(step.name)
        alive.add(step.name)
        for name in step.frees:
            if name not in alive:
                found = f"it frees {name}, which is " + ("gone" if name in seen else "not made yet")
                fail(where, step.name, "a value is freed once, after it was made", found)
            alive.remove(name)
        _verify_target(schedule, step, where)
    for name in refs_in(program.results):
        _verify_alive(where, "results", name, alive, seen)


def _verify_alive(where: str, place: str, name: str, alive: set[str], seen: set[str]) -> None:
    if name not in seen:
        fail(where, place, "a value is made before it is used", f"{name} is not made yet")
    if name not in alive:
        fail(where, place, "a freed value is not used again", f"{name} was freed before")


def _verify_target(schedule: Schedule, step: Step, where: str) -> None:
    rule = "a step names something that can run"
    kind, _, name = step.target.partition(":")
    if step.target.startswith(CALL):
        program = schedule.templates.get(name)
        if program is None:
            fail(where, step.name, rule, f"there is no template program {name}")
        if any(each.target.startswith(CALL) for each in program.steps):
            fail(where, step.name, rule, f"{name} calls others, and calls do not nest")
        if len(step.args) != len(program.inputs):
            found = f"{len(step.args)} operands, and {name} takes {len(program.inputs)}"
            fail(where, step.name, "a call gives what its program takes", found)
    elif step.target.startswith(ISLAND):
        found = schedule.islands.get(name)
        if found is None:
            fail(where, step.name, rule, f"there is no island {name}")
        if len(step.args) != len(found.program.inputs):
            text = f"{len(step.args)} operands, and {name} takes {len(found.program.inputs)}"
            fail(where, step.name, "a step gives what its island takes", text)
    elif step.target == CONSTANT:
        if len(step.args) != 1 or step.args[0] not in schedule.constants:
            fail(where, step.name, rule, f"there is no constant {step.args}")
    elif step.target.startswith(OBJECT):
        if name not in schedule.objects:
            fail(where, step.name, rule, f"there is no {kind} {name}")
    else:
        try:
            resolve(step.target)
        except (KeyError, AttributeError, ValueError):
            fail(where, step.name, rule, f"there is no operator {step.target}")


def _edge(schedule: Schedule, name: str) -> tuple[int, int]:
    """How many inputs and results a program has; the two of a split backward count as one."""
    names, num_kept = [name], 0
    if name == "backward" and "backward_weight" in schedule.programs:
        names = ["backward_input", "backward_weight"]
        num_kept = sum(given.startswith("kept:") for given in schedule.weight_inputs)
    programs = [schedule.programs.get(each) for each in names]
    if None in programs:
        raise GraphError(f"the schedule has no program {name!r}, and its edge needs one.")
    known = [program for program in programs if program is not None]
    return len(known[0].inputs), sum(len(each.results) for each in known) - num_kept


def _verify_edges(schedule: Schedule) -> None:
    """Check that the programs take and give what the schedule describes."""
    if "optimizer" in schedule.programs or schedule.optimizer_inputs:
        num_inputs, num_results = _edge(schedule, "optimizer")
        if (num_inputs, num_results) != (len(schedule.optimizer_inputs), 0):
            rule = "programs take and give what the schedule describes"
            described = f"not {len(schedule.optimizer_inputs)} inputs and none"
            found = f"{num_inputs} inputs and {num_results} results, {described}"
            fail("program optimizer", "edge", rule, found)
    if not schedule.inputs and not schedule.outputs:
        return
    tangents = [value for value in schedule.inputs if value.role is Role.TANGENT]
    gradients = [value for value in schedule.outputs if value.role is Role.GRADIENT]
    computed = [value for value in schedule.saved if value.role is Role.SAVED]
    forward = (
        len(schedule.inputs) - len(tangents),
        len(schedule.outputs) - len(gradients) + len(computed),
    )
    backward = (len(schedule.saved) + len(tangents), len(gradients))
    for name, (num_inputs, num_results) in {"forward": forward, "backward": backward}.items():
        if name == "backward" and not tangents:
            continue
        found = _edge(schedule, name)
        if found != (num_inputs, num_results):
            rule = "programs take and give what the schedule describes"
            text = f"{found[0]} inputs and {found[1]} results, not {num_inputs} and {num_results}"
            fail(f"program {name}", "edge", rule, text)
