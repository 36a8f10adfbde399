"""`plait.capture`: the whole program of a model as one `Graph`, without touching the model.

The model is read on a fake copy, whose tensors have shapes but no memory: a model that no machine
could hold is captured on a laptop. Parameters keep their names in the graph's inputs.
"""

# pyright: basic
# (TorchDynamo is not typed.)

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch._dynamo import exc
from torch._dynamo.convert_frame import fullgraph_capture
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from plait.collector import collector_paused
from plait.errors import GraphError, PlanError
from plait.graph.compose import Names, compose
from plait.graph.distributed import localize, name_groups
from plait.graph.graph import Graph, Role
from plait.graph.parallelize import keep_local_parameters, parallelize
from plait.graph.plan_mesh import plan_mesh
from plait.graph.regions import Blocks, marking_blocks
from plait.graph.trace import NotATemplate
from plait.graph.whole import compose_whole
from plait.plan.parallel_plan import ParallelPlan, Recompute

_NOT_ONE_GRAPH = (
    exc.Unsupported,
    exc.UncapturedHigherOrderOpError,
    exc.UserError,
    exc.TorchRuntimeError,
)
Loss = Callable[..., Tensor]
_LAYERS = 4
"""Of a piece, where replicas go through attention: fewer ends, and more to trace."""


def capture(
    model: nn.Module,
    *inputs: object,
    plan: ParallelPlan | None = None,
    loss: Loss | None = None,
) -> Graph:
    """Capture the forward of `model(*inputs)`, or with a loss the forward and backward of a step.

    inputs: tensors (real, fake or meta; only their shapes matter) and plain values. A plan may also
    be given as the last of them; with micro-batches, the graph is that of one of them. With dp or
    fsdp in the plan the inputs are those of one rank, and `compile` adds what the ranks do together
    before and after. loss: a
    function `loss(model, *inputs)` that returns a scalar.

    The inputs of the graph are what the program reads: parameters and buffers by name, the tensors
    among `inputs` by number, and a tangent for each output. Its outputs are the model's tensors or
    the loss, the new values of buffers that it changes, and the gradients of the parameters. Under
    torch.no_grad() there are no tangents and no gradients.

    Raises GraphError where the program cannot be one graph, and PlanError where the inputs
    contradict the plan.
    """
    if inputs and isinstance(inputs[-1], ParallelPlan):
        if plan is not None:
            raise GraphError("two plans were given: one among the inputs and one by name.")
        inputs, plan = inputs[:-1], inputs[-1]
    plan = plan or ParallelPlan()
    plan.check_inputs(inputs)
    if plan.ep > 1:
        raise PlanError(f"plait.capture keeps all experts on each rank: ep={plan.ep} must be 1.")
    if plan.pp > 1 or plan.cp > 1:
        raise PlanError(
            "plait.capture takes a whole model and whole sequences so far; leave pp and cp at 1 in "
            "the plan."
        )
    if plan.tp == 1:
        return _capture(model, inputs, plan, loss, None)
    device = next((p.device.type for p in model.parameters()), "cpu")
    with plan_mesh(plan, "cpu" if device == "meta" else device) as mesh:
        return _capture(model, inputs, plan, loss, mesh["tp"])


@collector_paused()
def _capture(
    model: nn.Module,
    inputs: tuple[object, ...],
    plan: ParallelPlan,
    loss: Loss | None,
    mesh: DeviceMesh | None,
) -> Graph:
    fake_mode = FakeTensorMode()
    fake_model = _fake_copy(model, fake_mode)
    if mesh is not None:
        with fake_mode:
            keep_local_parameters(parallelize(fake_model, plan, mesh))
    fake_inputs = [
        _fake_part(x, fake_mode, plan.num_micro_batches) if isinstance(x, Tensor) else x
        for x in inputs
    ]
    program = fake_model if loss is None else _Step(fake_model, loss)
    try:
        with (
            marking_blocks(Blocks(takes_hooks=True)),
            torch._dynamo.config.patch(
                automatic_dynamic_shapes=False, inline_single_use_invoke_subgraph=False
            ),
            get_metrics_context(),
            dynamo_timed("fullgraph_capture"),
        ):
            captured = fullgraph_capture(program, tuple(fake_inputs)).backend_input
    except _NOT_ONE_GRAPH as error:
        raise GraphError(f"the model is not one graph: {_plain(error)}") from error
    if captured is None:
        raise GraphError("the model computes nothing: there is no operator to capture.")
    module = captured.graph_module
    examples, meshes = localize(module, captured.example_inputs)
    names = _names(module, examples, fake_model, fake_inputs)
    with tracing(TracingContext(captured.fake_mode)):
        try:
            graph = compose(
                module,
                captured.fake_mode,
                names,
                num_attentions=_num_attentions(plan, fake_inputs),
            )
        except NotATemplate:
            graph = compose_whole(module, captured.fake_mode, names)
    name_groups(graph, [*meshes, *([] if mesh is None else [mesh])])
    graph.is_step = loss is not None
    return graph


def _num_attentions(plan: ParallelPlan, inputs: Sequence[object]) -> int:
    """How many attentions a piece spans (see `cut`).

    At the end of a piece the last replica has no other to hide behind. Where attention is split
    too, along the batch or causally, it is no such end, and larger pieces have fewer; but what is
    computed again, with recompute, is a piece.
    """
    if plan.replicas == 1:
        return 0
    batch = next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim() > 1), 1)
    splits_attention = plan.causal_split or batch > 1
    return _LAYERS if splits_attention and plan.recompute is Recompute.NONE else 1


class _Step(nn.Module):
    """The model and its loss, as one module."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *inputs: object) -> Tensor:
        return self.loss(self.model, *inputs)


def _fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy with fake parameters and buffers; shared ones stay shared."""
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = _fake(tensor.detach(), mode)
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    return copy.deepcopy(model, memo)


def _fake(x: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake of a tensor; of a meta tensor, one on the CPU."""
    if isinstance(x, FakeTensor) or x.device.type == "meta":
        device = "cpu" if x.device.type == "meta" else x.device
        with mode:
            fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return fake.requires_grad_(x.requires_grad)
    return mode.from_tensor(x, static_shapes=True)


def _fake_part(x: Tensor, mode: FakeTensorMode, parts: int) -> Tensor:
    """A fake of the first micro-batch of an input."""
    fake = _fake(x, mode)
    return fake.chunk(parts)[0] if parts > 1 and x.dim() else fake


def _names(module: fx.GraphModule, examples: list, model: nn.Module, inputs: list[object]) -> Names:
    """Say of each input of the graph which parameter, buffer or input of the user it is."""
    known: dict[int, tuple[Role, str]] = {}
    for i, x in enumerate(x for x in inputs if isinstance(x, Tensor)):
        known[id(x)] = (Role.INPUT, str(i))
    for name, x in model.named_buffers():
        known.setdefault(id(x), (Role.BUFFER, name))
    for name, x in model.named_parameters():
        known.setdefault(id(x), (Role.PARAMETER, name))
    names: Names = {}
    placeholders = module.graph.find_nodes(op="placeholder")
    for node, example in zip(placeholders, examples, strict=True):
        if id(example) not in known:
            raise GraphError(f"the program reads {node.name}, which is no input of it.")
        names[node] = known[id(example)]
    return names


def _plain(error: Exception) -> str:
    """The first sentence of Dynamo's explanation, and the user's line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    explanation = [line for line in lines if line.startswith("Explanation:")]
    text = (explanation or lines)[0].removeprefix("Explanation:").strip()
    stack = getattr(error, "real_stack", None)
    return f"{text} ({stack[-1].filename}:{stack[-1].lineno})" if stack else text
