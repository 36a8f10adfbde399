"""The backend of torch.compile: frame by frame, from Dynamo's graph to a running schedule."""

# pyright: basic
# (TorchDynamo and AOTAutograd are not typed.)

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import fx
from torch._dynamo import exc
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import default_partition
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode

from plait.backend.fingerprint import Fingerprint, Uncacheable
from plait.backend.reads import Read, reads_of
from plait.backend.report import CapturedGraph, new_report
from plait.backend.spread_frame import capture_spread, meshes_of
from plait.collector import collector_paused
from plait.compiler.compile import compile as compile_graph
from plait.compiler.fuse import fuse_module
from plait.compiler.levels import has_islands, passes_of
from plait.compiler.lower import Lowering
from plait.compiler.strict import has_strict_operators
from plait.cost import clusters
from plait.errors import ConfigError, nearest_name
from plait.executor.codegen import Runner, load
from plait.executor.islands import compile_islands
from plait.executor.kernel_batch import warm_up
from plait.executor.run import Runnable
from plait.graph import regions
from plait.graph.breaks import is_library
from plait.graph.compose import compose
from plait.graph.cut import BETWEEN
from plait.graph.eager_kernels import kernels_of_eager
from plait.graph.graph import FORWARD, Graph, call_of
from plait.graph.inline import inline_regions
from plait.graph.island import Island
from plait.graph.regions import Blocks, watch_blocks
from plait.graph.schedule import Schedule
from plait.graph.side_effects import changes
from plait.graph.source import resumed
from plait.graph.sources import name_sources
from plait.graph.trace import NotATemplate, first_line
from plait.graph.uses import part_uses, unite_uses
from plait.graph.whole import AS_EAGER
from plait.plan.parallel_plan import ParallelPlan

_OPTIONS = ("level", "replicas")
_FRAME = re.compile(r'\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)')


def plait_backend(
    module: fx.GraphModule,
    inputs: Sequence,
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Callable:
    """Compile one frame: the entry point behind torch.compile(model, backend="plait").

    options: level, see `compiler/levels.py`; replicas, of a model that `parallelize` has spread
    over ranks, see `plan/parallel_plan.py`.

    Raises ConfigError for a `mode` of torch.compile, all of which are Inductor's.
    """
    if mode is not None:
        raise ConfigError(
            f'mode={mode!r} is Inductor\'s, and backend="plait" has levels instead: leave the '
            'mode out and say options={"level": "O0"}, "O1" or "O2".'
        )
    options = dict(options or {})
    for name in options:
        if name not in _OPTIONS:
            raise ConfigError(f"there is no option {name!r}. {nearest_name(name, _OPTIONS)}")
    replicas: Any = options.get("replicas", 1)
    replicas = ParallelPlan(replicas=replicas).replicas  # of a list, what can be compared
    return _backend_of(str(options.get("level", "O0")), replicas)(module, inputs)


class Backend:
    """Compile what Dynamo captured, at one level; `report` collects what happened.

    replicas: of frames of a model that is spread over ranks.
    """

    def __init__(self, level: str = "O0", replicas: int | str = 1) -> None:
        self.level = level
        self.replicas = ParallelPlan(replicas=replicas).replicas  # raises if there are none such
        if has_islands(level):  # raises if there is no such level
            warm_up()
        self.blocks = Blocks()
        self.frames: list[Frame] = []
        self.storing: Fingerprint | None = None  # of the program whose `frames` are wanted
        self.report = new_report(level)
        watch_blocks()

    def __call__(self, module: fx.GraphModule, inputs: Sequence) -> Callable:
        """Return a function of the frame's inputs, as torch.compile asks for."""
        with functorch_config.patch(AS_EAGER), collector_paused():
            return self._compile(module, inputs)

    def _compile(self, module: fx.GraphModule, inputs: Sequence) -> Callable:
        for block, reason in self.blocks.refused.items():
            self.report.flat_blocks[block.__name__] = reason
        where = place_of(module)
        if self.replicas != 1 and meshes_of(inputs):
            return self._compile_spread(module, inputs, where)
        again, graph, reason = part_uses(module), None, ""
        try:
            with self._timed("trace"):
                graph = compose(module, _fake_mode())
        except NotATemplate as error:
            reason = str(error)
        unite_uses(module, again)  # Dynamo still looks at its module
        if graph is None:
            return self._compile_whole(module, inputs, reason)
        with self._timed("generate"):
            runnable = Runnable(compile_graph(graph, level=self.level))
        described = describe_graph(where, graph)
        self.report.add(described, graph)
        self.report.note_islands(runnable.schedule, runnable.islands)
        translator = InstructionTranslator.current_tx()
        if self.storing is None or any(changes(translator)):
            return _repeating(runnable, again)
        frame = Frame(
            schedule=runnable.schedule,
            graph=described,
            input_ids=[id(x) for x in (*inputs, *(inputs[i] for i in again))],
            files={code.co_filename for code in translator.output.tracing_context.traced_code},
        )
        try:
            frame.reads = reads_of(translator.output.guards, _scope(translator), self.storing)
        except Uncacheable as reason:
            frame.obstacle = str(reason)
        self.frames.append(frame)

        run = _repeating(runnable, again)

        def first_and_later(*values):
            results = run(*values)
            if frame.results is None and self.storing is not None:
                frame.results = results
            return results

        return first_and_later

    def _compile_spread(self, module: fx.GraphModule, inputs: Sequence, where: str) -> Callable:
        """Compile a frame of a model that is spread over ranks, in replicas."""
        with self._timed("trace"):
            graph = capture_spread(module, inputs, self.replicas, _fake_mode())
        with self._timed("generate"):
            frame = graph.compiled(self.level)
        self.report.add(describe_graph(where, graph.graph), graph.graph)
        self.report.note_islands(frame.runnable.schedule, frame.runnable.islands)
        return frame

    def _compile_whole(self, module: fx.GraphModule, inputs: Sequence, reason: str) -> Callable:
        """Capture by AOTAutograd, which knows every case, block after block."""
        inline_regions(module)
        again = part_uses(module)
        module.recompile()
        examples = [*inputs, *(inputs[i].detach().requires_grad_() for i in again)]
        frame = WholeFrame(self, module)
        self.report.whole_graphs[place_of(module)] = reason
        try:
            with self._timed("trace"), kernels_of_eager():
                compiled = aot_autograd(
                    fw_compiler=frame.compile_forward,
                    bw_compiler=frame.compile_backward,
                    inference_compiler=frame.compile_forward,
                    partition_fn=frame.partition,
                )(module, examples)
            return _repeating(compiled, again)
        except exc.RestartAnalysis:
            raise  # Dynamo reads the program anew, and knows more of it then
        except (RuntimeError, NotImplementedError) as error:
            # What Dynamo captured is the user's own operators: they run as they are, under
            # autograd, and the report says so.
            self.report.eager_graphs[place_of(module)] = first_line(error)
            self.report.graphs.append(CapturedGraph(place_of(module), 0, {}, 0))
            return _repeating(module.forward, again)
        finally:
            unite_uses(module, again)

    @contextmanager
    def _timed(self, phase: str):
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.report.phases_s[phase] += time.perf_counter() - start_s


@dataclass
class Frame:
    """A composed graph without side effects, which could be kept: what `jit` needs to store it."""

    schedule: Schedule
    graph: CapturedGraph
    input_ids: list[int]
    files: set[str]
    reads: list[Read] = field(default_factory=list)
    obstacle: str = ""  # why what it reads cannot be compared in another process
    results: tuple | None = None  # of the first run, until they were looked at


class WholeFrame:
    """A frame captured by AOTAutograd: the callbacks that it wants."""

    def __init__(self, backend: Backend, module: fx.GraphModule) -> None:
        self.backend = backend
        self.where = place_of(module)
        self.is_known = False

    def partition(
        self, joint: fx.GraphModule, inputs: Sequence, *, num_fwd_outputs: int, **options
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Run the level's passes on the joint graph, then part it."""
        root = self.through_passes(joint, num_fwd_outputs)
        return default_partition(root, inputs, num_fwd_outputs=num_fwd_outputs, **options)

    def compile_forward(self, module: fx.GraphModule, inputs: Sequence) -> Runner:
        """Make the forward program run; of an inference graph there is nothing else."""
        if not self.is_known:
            module = self.through_passes(module, 0)
        return self.load("forward", module)

    def compile_backward(self, module: fx.GraphModule, inputs: Sequence) -> Runner:
        """Make the backward program run."""
        return self.load("backward", module)

    def through_passes(self, root: fx.GraphModule, num_outputs: int) -> fx.GraphModule:
        """Run the level's passes on a graph without templates."""
        name_sources(root)
        graph = Graph(root, {}, (), (), num_outputs)
        for each in passes_of(self.backend.level):
            graph = each(graph, ParallelPlan(), clusters.cpu())
        self.backend.report.add(describe_graph(self.where, graph), graph)
        self.backend.report.notes += map(str, graph.notes)
        self.is_known = True
        return graph.root

    def load(self, name: str, module: fx.GraphModule) -> Runner:
        """Order and generate one program."""
        with self.backend._timed("generate"):
            found: dict[str, Island] = {}
            if has_islands(self.backend.level) and not has_strict_operators(module):
                module = fuse_module(module, found)
                if self.backend.level == "O2":
                    text = "was captured as a whole: it runs in islands, as at O1"
                    self.backend.report.notes.append(f"{self.where}, {name}, {text}")
            lowering = Lowering()
            for island in found.values():
                lowering.island(island)
            schedule = Schedule(
                self.backend.level,
                {name: lowering.program(name, module)},
                constants=lowering.constants,
                objects=lowering.objects,
                islands=lowering.islands,
            )
            islands = compile_islands(schedule)
            self.backend.report.note_islands(schedule, islands)
            runner = load(schedule, islands=islands.kernels)[name]
        runner._boxed_call = True  # type: ignore[attr-defined]
        return runner


def _fake_mode() -> FakeTensorMode:
    mode = TracingContext.get().fake_mode
    assert mode is not None
    return mode


def _repeating(run: Callable, again: Sequence[int]) -> Callable:
    """With the inputs that `part_uses` made."""
    return (lambda *values: run(*values, *(values[i] for i in again))) if again else run


def _scope(translator) -> dict[str, dict]:
    root = translator.output.root_tx
    return {"G": root.f_globals, "L": root.f_locals}


def describe_graph(where: str, graph: Graph) -> CapturedGraph:
    """What the report says of a graph."""
    calls = [call_of(node) for node in graph.root.graph.nodes]
    counts = Counter(
        graph.templates[call[0]].block for call in calls if call and call[1] == FORWARD
    )
    del counts[BETWEEN]
    return CapturedGraph(
        where=where,
        num_operators=graph.num_operators(),
        blocks=dict(counts),
        num_templates=sum(each.block != BETWEEN for each in graph.templates.values()),
    )


def place_of(module: fx.GraphModule) -> str:
    """The first line in a graph that is not Plait's or torch's own: "file:line, in function"."""
    for node in module.graph.nodes:
        for line in (node.meta.get("stack_trace") or "").splitlines():
            found = _FRAME.match(line)
            if found and found["file"] != regions.__file__ and not is_library(found["file"]):
                return f"{found['file']}:{found['line']}, in {resumed(found['function'])}"
    return "a graph of library code"


@cache
def _backend_of(level: str, replicas: int | str) -> Backend:
    backend = Backend(level, replicas)
    backend.blocks = plait_backend.blocks  # type: ignore[attr-defined]
    return backend


plait_backend.blocks = Blocks()  # type: ignore[attr-defined]
watch_blocks()
