"""From graph to schedule: the passes of a level, then programs in order."""

from torch import fx

from plait.compiler.levels import passes_of
from plait.compiler.lower import Lowering
from plait.graph.graph import Graph, Role
from plait.graph.partition import part_joint
from plait.graph.schedule import Schedule


def compile_graph(graph: Graph, *, level: str = "O0") -> Schedule:
    """Run the level's passes, part forward from backward, and order the steps.

    The schedule's programs are `forward`, and `backward` if the graph has gradients. `forward`
    returns the outputs, then the values of `saved`; `backward` takes those, then the tangents.
    """
    for each in passes_of(level):
        graph = each.run(graph)
    lowering = Lowering()
    schedule = Schedule(
        level,
        inputs=graph.inputs,
        outputs=graph.outputs,
        constants=lowering.constants,
        objects=lowering.objects,
    )
    for template in graph.templates.values():
        schedule.templates.update(lowering.template(template))
    if graph.values(Role.TANGENT):
        num_arguments = len(graph.inputs) - len(graph.values(Role.TANGENT))
        parts = part_joint(
            graph.root, num_arguments=num_arguments, num_results=graph.num_forward_outputs
        )
        schedule.saved = parts.saved
        _add(schedule, lowering, {"forward": parts.forward, "backward": parts.backward})
    else:
        _add(schedule, lowering, {"forward": graph.root})
    return schedule


def _add(schedule: Schedule, lowering: Lowering, modules: dict[str, fx.GraphModule]) -> None:
    for name, module in modules.items():
        schedule.programs[name] = lowering.program(name, module)
