"""`plait.jit`: compile a function or module, and report on it."""

# pyright: basic
# (TorchDynamo is not typed.)

from collections.abc import Callable

import torch
from torch._dynamo import exc
from torch._dynamo.utils import compilation_time_metrics, graph_break_reasons

from plait.backend.report import Report, make_break
from plait.backend.torch_backend import Backend

_COMPILE = "_compile.compile_inner"


class Jitted:
    """A compiled function or module. Call it like the original; `report()` says what was done."""

    def __init__(
        self, function: Callable, *, level: str, dynamic: bool | None, fullgraph: bool
    ) -> None:
        self.original = function
        self._backend = Backend(level)
        optimize = torch._dynamo.optimize(
            backend=self._backend,
            nopython=fullgraph,
            dynamic=dynamic,
            guard_export_fn=self._count_guards,
            guard_fail_fn=self._note_failed_guard,
        )
        self._compiled = optimize(function)

    def __call__(self, *args, **kwargs):
        """Run as the original would, bit for bit."""
        num_breaks, num_graphs = len(graph_break_reasons), self._backend.report.num_graphs
        num_times = len(compilation_time_metrics.get(_COMPILE, ()))
        try:
            return self._compiled(*args, **kwargs)
        except exc.TorchRuntimeError:
            if len(graph_break_reasons) > num_breaks:
                raise
            # The program itself is wrong, say in its shapes, and nothing of it ran yet: let it
            # raise its own error, from its own line.
            return self.original(*args, **kwargs)
        finally:
            if len(graph_break_reasons) > num_breaks or (
                self._backend.report.num_graphs > num_graphs
            ):
                self._note_compilation(num_breaks, num_times)

    def report(self) -> Report:
        """What was compiled so far."""
        return self._backend.report

    def __getattr__(self, name: str):
        """Attributes of the original: parameters(), state_dict(), train(), ..."""
        if name.startswith("__") or "original" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.original, name)

    def _note_compilation(self, num_breaks: int, num_times: int) -> None:
        report = self._backend.report
        for cause in graph_break_reasons[num_breaks:]:
            report.breaks.append(make_break(cause.reason, cause.user_stack))
        known_s = sum(report.phases_s.values()) - report.phases_s["read"]
        self._total_s = getattr(self, "_total_s", 0.0) + sum(
            compilation_time_metrics.get(_COMPILE, ())[num_times:]
        )
        report.phases_s["read"] = self._total_s - known_s

    def _count_guards(self, guards) -> None:
        self._backend.report.num_guards += len(guards)

    def _note_failed_guard(self, failure) -> None:
        self._backend.report.recompilations.append(str(failure.reason).strip())


def jit(
    function: Callable,
    *,
    level: str = "O0",
    numerics: str = "fast",
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Jitted:
    """Compile a function or module, with each kind of repeated block captured once."""
    return Jitted(function, level=level, dynamic=dynamic, fullgraph=fullgraph)
