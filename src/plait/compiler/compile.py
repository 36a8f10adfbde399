"""`plait.compile`: from graph to schedule. The passes of a level, then programs in order."""

from collections.abc import Sequence

from torch.optim import Optimizer

from plait.collector import collector_paused
from plait.compiler.levels import has_islands, passes_of
from plait.compiler.lower import Lowering
from plait.compiler.shard import add_data_parallel
from plait.compiler.split_backward import split_backward
from plait.compiler.whole_program import as_one_island
from plait.cost import clusters
from plait.cost.clusters import Cluster
from plait.errors import GraphError, PlanError
from plait.graph.graph import Graph, Module, Role, Value
from plait.graph.island import Island
from plait.graph.partition import part_joint
from plait.graph.schedule import Schedule
from plait.graph.trace_optimizer import trace_optimizers
from plait.ops.numerics import Numerics
from plait.plan.parallel_plan import ParallelPlan


@collector_paused()
def compile(
    graph: Graph,
    plan: ParallelPlan | None = None,
    *,
    level: str = "O0",
    numerics: Numerics = "fast",
    cluster: Cluster | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> Schedule:
    """Run the level's passes, part forward from backward, and order the steps.

    The schedule's programs are `forward`, and `backward` if the graph has gradients; the plan may
    ask for `backward_input` and `backward_weight` instead. `forward` returns the graph's forward
    outputs, then the computed ones of `saved`; the backward takes `saved` and the tangents, and
    returns the gradients.

    A step of a plan with fsdp or dp has the programs `unshard` and `reduce_gradients` (see
    `compiler/shard.py`); the graph is captured with the batch of one rank.

    numerics: "strict" makes the result and the input gradient of a row (a token) independent of how
    many rows there are (see `compiler/strict.py`); `schedule.report()` says what could not be.

    cluster: the machine for which replicas are chosen and ordered; by default one of the kind on
    which the graph was captured.

    optimizer: becomes the last program of a training step, `optimizer` (several run in turn). It
    changes parameters and state in place; its learning rate may change between steps.

    Raises GraphError if there is no such level, or no such numerics, and for an optimizer whose
    step is not one program; PlanError if the plan wants a number of replicas that cannot be had.
    """
    plan = plan or ParallelPlan()
    if plan.cp > 1 or plan.ep > 1:
        raise PlanError(
            f"plait.compile does not place cp={plan.cp} and ep={plan.ep} yet; the dry run prices "
            "them. Set both to 1."
        )
    cluster = cluster or _default_cluster(graph, plan)
    for each in passes_of(level, numerics, plan):
        graph = each(graph, plan, cluster)
    lowering = Lowering()
    schedule = Schedule(
        level,
        inputs=graph.inputs,
        outputs=graph.outputs,
        constants=lowering.constants,
        objects=lowering.objects,
        is_step=graph.is_step,
        arguments=graph.arguments,
        num_micro_batches=plan.num_micro_batches,
        numerics=numerics,
        notes=graph.notes,
        certificates=graph.certificates,
        groups={name: group.size for name, group in graph.groups.items()},
        islands=lowering.islands,
    )
    for island in graph.islands.values():
        lowering.island(island)
    for template in () if graph.is_whole else graph.templates.values():
        schedule.templates.update(lowering.template(template))
    modules = {"forward": graph.root}
    if graph.values(Role.TANGENT):
        num_arguments = len(graph.inputs) - len(graph.values(Role.TANGENT))
        parts = part_joint(
            graph.root, num_arguments=num_arguments, num_results=graph.num_forward_outputs
        )
        schedule.saved = parts.saved
        modules = {"forward": parts.forward, "backward": parts.backward}
        if plan.split_backward:
            is_weight = [graph_input.role is Role.PARAMETER for graph_input in _of_gradients(graph)]
            split = split_backward(parts.backward, graph.templates, is_weight)
            for name, module in split.parts.items():
                schedule.templates[name] = lowering.program(name, module)
            schedule.weight_inputs = tuple(split.weight_inputs)
            modules = {"forward": parts.forward, **split.programs}
    for name, module in modules.items():
        program = _as_one_island(module, graph, lowering) if graph.is_whole else module
        schedule.programs[name] = lowering.program(name, program)
    add_data_parallel(schedule, plan, lowering)
    if optimizer is not None:
        _add_optimizer(schedule, graph, optimizer, lowering)
    return schedule


def _as_one_island(module: Module, graph: Graph, lowering: Lowering) -> Module:
    islands: dict[str, Island] = {}
    module = as_one_island(module, graph, islands)
    for island in islands.values():
        lowering.island(island)
    return module


def _default_cluster(graph: Graph, plan: ParallelPlan) -> Cluster:
    is_gpu = any(value.device.startswith("cuda") for value in graph.inputs)
    return clusters.h200(plan.num_ranks) if is_gpu else clusters.cpu(plan.num_ranks)


def _add_optimizer(
    schedule: Schedule,
    graph: Graph,
    optimizer: Optimizer | Sequence[Optimizer],
    lowering: Lowering,
) -> None:
    if not graph.is_step:
        raise GraphError(
            "an optimizer belongs to a training step: capture with plait.capture(..., loss=...)."
        )
    gradients = {value.name for value in graph.values(Role.GRADIENT)}
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    traced = trace_optimizers(optimizers, gradients, fuse=has_fused_step(schedule))
    schedule.programs["optimizer"] = lowering.program("optimizer", traced.module)
    schedule.optimizer_inputs, schedule.optimizer_settings = traced.inputs, traced.settings


def has_fused_step(schedule: Schedule) -> bool:
    """Whether the optimizer's program may take fused kernels: at the levels that round anew."""
    return has_islands(schedule.level) and schedule.numerics != "strict"


def _of_gradients(graph: Graph) -> list[Value]:
    """For each gradient, the input that it is the gradient of."""
    inputs = {value.name: value for value in graph.inputs if value.role is not Role.TANGENT}
    return [inputs[value.name] for value in graph.values(Role.GRADIENT)]
