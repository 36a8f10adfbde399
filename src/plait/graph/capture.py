"""`plait.capture`: the whole program of a model as one `Graph`, without touching the model.

The model is read on a fake copy, whose tensors have shapes but no memory: a model that no machine
could hold is captured on a laptop. Parameters keep their names in the graph's inputs.
"""

# pyright: basic
# (TorchDynamo is not typed.)

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch._dynamo import exc
from torch._dynamo.comptime import comptime
from torch._dynamo.convert_frame import fullgraph_capture
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._guards import TracingContext, tracing
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from plait.collector import collector_paused
from plait.errors import GraphError, PlanError
from plait.graph.breaks import make_break
from plait.graph.compose import Names, compose
from plait.graph.distributed import localize, name_groups
from plait.graph.graph import Graph, Role, describe_argument
from plait.graph.note import CAPTURE, Note
from plait.graph.parallelize import keep_local_parameters, parallelize
from plait.graph.plan_mesh import plan_mesh
from plait.graph.regions import Blocks, marking_blocks
from plait.graph.side_effects import refuse_side_effects
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
_LAYERS, _LAYERS_THROUGH_ATTENTION = 2, 4
"""Of a piece that may be split: fewer ends, and more to order. The second where replicas go through
attention too, which is no end then."""


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

    Raises GraphError where the program cannot be one graph, where it changes anything but buffers
    in place, and where a loss is no scalar; PlanError where the inputs contradict the plan.
    """
    if inputs and isinstance(inputs[-1], ParallelPlan):
        if plan is not None:
            raise GraphError("two plans were given: one among the inputs and one by name.")
        inputs, plan = inputs[:-1], inputs[-1]
    plan = plan or ParallelPlan()
    _check_call(model, inputs, loss)
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
    program, blocks = _Whole(fake_model, loss), Blocks(takes_hooks=True)
    try:
        with (
            _saying_errors_once(),
            marking_blocks(blocks),
            torch._dynamo.config.patch(
                automatic_dynamic_shapes=False, inline_single_use_invoke_subgraph=False
            ),
            get_metrics_context(),
            dynamo_timed("fullgraph_capture"),
        ):
            captured = fullgraph_capture(program, tuple(fake_inputs)).backend_input
    except GraphError as error:
        raise error.with_traceback(None) from None  # TorchDynamo's own lines tell nobody anything
    except _NOT_ONE_GRAPH as error:
        raise GraphError(_said(error)) from error
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
                num_attentions=num_attentions(plan, fake_inputs),
            )
        except NotATemplate as error:
            graph = compose_whole(module, captured.fake_mode, names)
            graph.notes = (_note("graph", f"captured as one piece: {error}"),)
    graph.notes += tuple(
        _note(block.__name__, f"each captured by itself: {reason}")
        for block, reason in blocks.refused.items()
    )
    name_groups(graph, [*meshes, *([] if mesh is None else [mesh])])
    graph.is_step = loss is not None
    graph.arguments = tuple(describe_argument(x) for x in inputs)
    return graph


def _note(what: str, text: str) -> Note:
    return Note(by=CAPTURE, operator=what, node="root", text=text, is_refusal=True)


def num_attentions(plan: ParallelPlan, inputs: Sequence[object]) -> int:
    """How many attentions a piece spans (see `cut`).

    At the ends of a piece there is nothing to hide behind: its last replica has no other, and the
    first sum of its backward none of the weight gradients that are made before. Larger pieces have
    fewer ends; but what is computed again, with recompute, is a piece, and so is what the plan
    gives a number of its own.
    """
    if plan.replicas == 1:
        return 0
    if plan.recompute is not Recompute.NONE or plan.replicas_by_piece is not None:
        return 1
    batch = next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim() > 1), 1)
    return _LAYERS_THROUGH_ATTENTION if plan.causal_split or batch > 1 else _LAYERS


class _Whole(nn.Module):
    """The model, or its loss; at the end it is looked at what was returned and changed."""

    def __init__(self, model: nn.Module, loss: Loss | None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *inputs: object) -> object:
        if self.loss is None:
            returned = self.model(*inputs)
        else:
            returned = self.loss(self.model, *inputs)
            comptime(_check_loss)
        comptime(_check_changes)
        return returned


def _check_loss(context) -> None:
    """Called by TorchDynamo where the loss has returned."""
    returned = context.get_local("returned")
    kind = returned.python_type()
    if issubclass(kind, Tensor):
        found = returned.as_fake()
        if found.numel() == 1:  # what autograd calls a scalar
            return
        what = f"a tensor of shape {tuple(found.shape)}"
    else:
        what = "None" if kind is type(None) else f"a {kind.__name__}"
    raise GraphError(
        f"the loss returned {what}. It must return one number as a tensor, such as the mean or the "
        "sum of what is to be small, and nothing beside it."
    )


def _check_changes(context) -> None:
    """Called by TorchDynamo at the end of the program."""
    refuse_side_effects(context._i_will_not_complain_if_bc_breaks_InstructionTranslator())


def _check_call(model: object, inputs: tuple[object, ...], loss: object) -> None:
    """Raise GraphError if the call to capture is none that Python would take."""
    if not isinstance(model, nn.Module):
        raise GraphError(
            f"plait.capture takes a torch.nn.Module, got {_named(model)}: the graph names its "
            "inputs by the module's parameters. plait.jit takes functions too."
        )
    if loss is not None and not callable(loss):
        raise GraphError(f"the loss must be a function loss(model, *inputs), got {loss!r}.")
    function, given = (model.forward, inputs) if loss is None else (loss, (model, *inputs))
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some builtin functions do not say what they take
    try:
        signature.bind(*given)
    except TypeError as error:
        whose = f"{type(model).__name__}.forward" if loss is None else f"the loss {_named(loss)}"
        raise GraphError(
            f"{whose}{signature} cannot be called with the {len(inputs)} inputs that "
            f"plait.capture was given: {error}."
        ) from None


def _named(x: object) -> str:
    return getattr(x, "__name__", None) or f"a {type(x).__name__}"


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


def _said(error: Exception) -> str:
    """Say why the program is not one graph, at the user's line, from TorchDynamo's error."""
    text, _, _ = str(error).partition("\nfrom user code:")
    found = make_break(text, getattr(error, "real_stack", None) or ())
    place = "" if found.where == "unknown" else f"{found.where}: "
    advice = found.advice[:1].upper() + found.advice[1:]
    return f"the model is not one graph: {place}{found.reason}. {advice}."


@contextmanager
def _saying_errors_once() -> Iterator[None]:
    """Keep the log of fake tensors from telling an error that is raised as well."""

    def is_no_error(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR

    log = logging.getLogger(fake_tensor.__name__)
    log.addFilter(is_no_error)
    try:
        yield
    finally:
        log.removeFilter(is_no_error)
