"""Islands as kernels: each is compiled once by TorchInductor, when a schedule is loaded.

What Inductor made is kept in its own cache on disk, so that the next process only loads it. An
island that cannot be compiled runs operator by operator, and is named in the report.
"""

# pyright: basic
# (TorchInductor is not typed.)

import time
import warnings
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from plait.errors import CompilerWarning
from plait.executor.codegen import Runner
from plait.executor.kernel_batch import KernelBatch, forget_modules, num_modules, warm_up
from plait.graph.graph import Value
from plait.graph.schedule import IslandProgram, Schedule, interpreted
from plait.ops.fused_kernel import compile_kernel


@dataclass
class Islands:
    """Kernels by the names of their islands; why the others have none; and the time it took."""

    kernels: dict[str, Runner] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    compile_s: float = 0.0

    def try_to_compile(self, name: str, island: IslandProgram) -> None:
        """Compile one, or note why it cannot be."""
        try:
            self.kernels[name] = compile_island(island)
        except Exception as error:  # Inductor raises what its parts raise; the report names it
            self.refused[name] = _reason(error)

    def lines(self) -> list[str]:
        """What was done, as text."""
        if not self.kernels and not self.refused:
            return []
        first = f"{len(self.kernels)} of them compiled, in {self.compile_s:.2f} s"
        return [first, *(f"{name} runs as O0: {why}" for name, why in self.refused.items())]


def compile_islands(schedule: Schedule) -> Islands:
    """Compile every island of a schedule.

    Without a working C++ compiler there is one warning, and all islands run as at O0.
    """
    found = Islands()
    if not schedule.islands:
        return found
    start_s = time.perf_counter()
    wait([warm_up()])
    batch = KernelBatch()
    with batch.collecting():
        for name, island in schedule.islands.items():
            found.try_to_compile(name, island)
    reason = next(iter(found.refused.values()), "")
    try:
        batch.build(num_modules())
    except Exception as error:  # what the C++ compiler raises: it is broken, or a kernel is
        reason = _reason(error)
        found.kernels.clear()
        forget_modules()
    if not found.kernels:
        if not _has_compiler():
            found.refused = dict.fromkeys(schedule.islands, reason)
            warnings.warn(_no_compiler(reason), CompilerWarning, stacklevel=2)
        elif batch.kernels:  # one kernel is wrong: each by itself, to learn which
            for name, island in schedule.islands.items():
                found.try_to_compile(name, island)
    found.compile_s = time.perf_counter() - start_s
    return found


def compile_island(island: IslandProgram) -> Runner:
    """Compile one island: a function that takes its operands in a list and returns a tuple."""

    def operands(mode: FakeTensorMode) -> list[torch.Tensor]:
        with mode:
            return [_empty(value) for value in island.takes]

    return compile_kernel(
        interpreted(island.program),
        operands,
        is_inference=not island.mode,
        settings=_whole_program_settings() if island.mode else None,
    )


def _whole_program_settings() -> dict[str, Any]:
    """Those of torch.compile(mode="max-autotune"); a step's replay is ours (`cuda_graph.py`)."""
    from torch._inductor import list_mode_options

    return {
        **list_mode_options("max-autotune"),
        "triton.cudagraphs": False,
        "pattern_matcher": True,
    }


def _empty(value: Value) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=value.device)


def _reason(error: Exception) -> str:
    lines: Sequence[str] = str(error).strip().splitlines() or [type(error).__name__]
    return f"{type(error).__name__}: {lines[0]}"


def _has_compiler() -> bool:
    """Whether a C++ program of one line can be built."""
    from torch._inductor.codecache import CppCodeCache

    try:
        CppCodeCache.load('extern "C" int plait_probe() { return 0; }')
    except Exception:  # whatever it is: there is no compiler that works
        return False
    return True


def _no_compiler(reason: str) -> str:
    return (
        "level O1 needs a C++ compiler, and none works here, so the kernels of level O0 run "
        f"({reason}). Install g++, or name a compiler in the environment variable CXX."
    )
