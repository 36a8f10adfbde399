"""The backend of torch.compile: frame by frame, from Dynamo's graph to a running schedule."""

# pyright: basic
# (TorchDynamo and AOTAutograd are not typed.)

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition

from plait.backend.report import CapturedGraph, Report
from plait.compiler.levels import passes_of
from plait.compiler.lower import Lowering
from plait.errors import ConfigError, nearest_name
from plait.executor.codegen import Runner, load
from plait.graph.blocks import Linked, link_blocks
from plait.graph.call import calling
from plait.graph.graph import Graph, call_of
from plait.graph.regions import Blocks, watch_blocks
from plait.graph.schedule import Schedule

_OPTIONS = ("level",)
_AS_EAGER = {
    # Eager's backward runs outside of the autocast of the forward.
    "backward_pass_autocast": "off",
    # Nothing here overwrites saved values, so a second backward may use them.
    "donated_buffer": False,
}


def plait_backend(
    module: fx.GraphModule, inputs: Sequence, *, options: Mapping[str, object] | None = None
) -> Callable:
    """Compile one frame: the entry point behind torch.compile(model, backend="plait")."""
    options = dict(options or {})
    for name in options:
        if name not in _OPTIONS:
            raise ConfigError(f"there is no option {name!r}. {nearest_name(name, _OPTIONS)}")
    return _backend_of_level(str(options.get("level", "O0")))(module, inputs)


class Backend:
    """Compile what Dynamo captured, at one level; `report` collects what happened."""

    def __init__(self, level: str = "O0") -> None:
        self.level = level
        self.passes = passes_of(level)
        self.blocks = Blocks()
        self.report = Report(level)
        watch_blocks()

    def __call__(self, module: fx.GraphModule, inputs: Sequence) -> Callable:
        """Return a function of the frame's inputs, as torch.compile asks for."""
        with torch._functorch.config.patch(_AS_EAGER):
            return self._compile(module, inputs)

    def _compile(self, module: fx.GraphModule, inputs: Sequence) -> Callable:
        with self._timed("blocks"):
            linked = link_blocks(module)
        for flat in linked.flat:
            self.report.flat_blocks[flat.block] = flat.reason
        for block, reason in self.blocks.refused.items():
            self.report.flat_blocks[block.__name__] = reason
        frame = _Frame(self, linked)
        before = self.report.phases_s.copy()
        start_s = time.perf_counter()
        with calling(linked.templates):
            compiled = aot_autograd(
                fw_compiler=frame.compile_forward,
                bw_compiler=frame.compile_backward,
                inference_compiler=frame.compile_forward,
                partition_fn=frame.partition,
            )(linked.module, inputs)
        inner_s = sum((self.report.phases_s - before).values())
        self.report.phases_s["differentiate"] += time.perf_counter() - start_s - inner_s
        self.report.graphs.append(frame.describe(module))
        return compiled

    @contextmanager
    def _timed(self, phase: str):
        start_s = time.perf_counter()
        yield
        self.report.phases_s[phase] += time.perf_counter() - start_s


class _Frame:
    """One frame on its way: the callbacks that AOTAutograd wants."""

    def __init__(self, backend: Backend, linked: Linked) -> None:
        self.backend = backend
        self.templates = linked.templates
        self.graph: Graph | None = None

    def partition(
        self, joint: fx.GraphModule, inputs: Sequence, *, num_fwd_outputs: int, **options
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Run the level's passes on the joint graph, then part it."""
        self.graph = self._through_passes(joint, num_fwd_outputs)
        with self.backend._timed("partition"):
            return default_partition(
                self.graph.root, inputs, num_fwd_outputs=num_fwd_outputs, **options
            )

    def compile_forward(self, module: fx.GraphModule, inputs: Sequence) -> Runner:
        """Make the forward program run; of an inference graph there is nothing else."""
        if self.graph is None:
            self.graph = self._through_passes(module, len(module.graph.output_node().args[0]))
        return self._load("forward", module)

    def compile_backward(self, module: fx.GraphModule, inputs: Sequence) -> Runner:
        """Make the backward program run."""
        return self._load("backward", module)

    def _through_passes(self, root: fx.GraphModule, num_forward_outputs: int) -> Graph:
        graph = Graph(root, self.templates, (), (), num_forward_outputs)
        for each in self.backend.passes:
            graph = each.run(graph)
        return graph

    def _load(self, name: str, module: fx.GraphModule) -> Runner:
        with self.backend._timed("generate"):
            lowering = Lowering()
            programs = {name: lowering.program(name, module)}
            templates = {
                part: program
                for used in _called(module)
                for part, program in lowering.template(self.templates[used]).items()
            }
            schedule = Schedule(
                self.backend.level,
                programs,
                templates,
                constants=lowering.constants,
                objects=lowering.objects,
            )
            runner = load(schedule)[name]
        runner._boxed_call = True  # type: ignore[attr-defined]
        return runner

    def describe(self, module: fx.GraphModule) -> CapturedGraph:
        assert self.graph is not None
        calls = Counter(_called(self.graph.root, forward_only=True))
        return CapturedGraph(
            where=_place(module),
            num_nodes=len(self.graph.root.graph.nodes),
            num_operators=self.graph.num_operators(),
            templates=dict(calls),
        )


def _called(module: fx.GraphModule, *, forward_only: bool = False) -> list[str]:
    calls = [call_of(node) for node in module.graph.nodes]
    return [call[0] for call in calls if call and (not forward_only or call[1] == "forward")]


def _place(module: fx.GraphModule) -> str:
    for node in module.graph.nodes:
        trace = node.meta.get("stack_trace")
        if trace:
            lines = [line for line in trace.splitlines() if line.strip().startswith("File ")]
            return lines[0].strip().removeprefix("File ").replace('"', "").replace(", line ", ":")
    return "a graph without operators"


@cache
def _backend_of_level(level: str) -> Backend:
    backend = Backend(level)
    backend.blocks = plait_backend.blocks  # type: ignore[attr-defined]
    return backend


plait_backend.blocks = Blocks()  # type: ignore[attr-defined]
watch_blocks()
