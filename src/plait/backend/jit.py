"""`plait.jit`: compile a function or module, keep what was compiled, and report on it."""

# pyright: basic
# (TorchDynamo is not typed.)

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo import eval_frame, exc
from torch.utils import _pytree as pytree

from plait.backend.fingerprint import Fingerprint, Uncacheable, fingerprint
from plait.backend.reads import Comparison, compare
from plait.backend.report import Report, is_collecting
from plait.backend.store import Entry, call_form, key_of, load, save
from plait.backend.torch_backend import Backend
from plait.backend.watch import Watch
from plait.collector import collector_paused
from plait.config import cache_folder
from plait.errors import ConfigError, GraphError
from plait.executor.run import Runnable
from plait.graph.breaks import make_break

_MAX_RECOMPILATIONS = 32
_DYNAMO_OPTIONS = {
    "inline_single_use_invoke_subgraph": False,  # a block is a block, however often it runs
    "run_gc_after_compile": False,  # as in `collector_paused`: what is garbage is found later
}


def jit(
    function: Callable,
    *,
    level: str = "O0",
    replicas: int | str = 1,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    cache: bool = True,
) -> "Jitted":
    """Compile a function or module at its first call; the results keep eager's bits at level O0.

    What cannot be captured runs as plain Python between graphs, unless `fullgraph` asks for an
    error. dynamic: True lets sizes vary from the start, None from the second size on, False never.
    replicas: of a model that is spread over ranks, parts of its tokens or batch whose communication
    hides behind each other's work: a number, or "auto" (see `ParallelPlan`).
    cache: look for a stored schedule first, and store a new one, in the folder that the environment
    variable PLAIT_CACHE names (default: the user's cache).

    Raises GraphError if there is no such level, PlanError if there is no such number of replicas.
    """
    return Jitted(
        function,
        level=level,
        replicas=replicas,
        dynamic=dynamic,
        fullgraph=fullgraph,
        cache=cache,
    )


@dataclass(frozen=True)
class _Stored:
    entry: Entry
    runnable: Runnable
    reads: Comparison


class Jitted:
    """A compiled function or module. Call it like the original; `report()` says what was done."""

    def __init__(
        self,
        function: Callable,
        *,
        level: str,
        replicas: int | str,
        dynamic: bool | None,
        fullgraph: bool,
        cache: bool,
    ) -> None:
        if not callable(function):
            raise ConfigError(f"plait.jit takes a function or module, got {function!r}.")
        self.original = function
        self._options = {
            "level": level,
            "replicas": replicas,
            "dynamic": dynamic,
            "fullgraph": fullgraph,
            "cache": cache,
        }
        self._dynamic = dynamic
        self._backend = Backend(level, replicas)
        if cache and replicas != 1:
            self._backend.report.notes.append("not kept in the compile cache: it is in replicas")
            cache = False
        self._folder = cache_folder() if cache and not is_collecting() else None
        self._found: Fingerprint | None = None
        self._stored: dict[str, _Stored] = {}
        self._stored_sizes: list[torch.Size | None] = []  # of the last call that was run from disk
        self._captured: set[str] = set()  # forms of calls that Dynamo knows in this process
        self._has_run = False
        name = getattr(function, "__qualname__", type(function).__qualname__)
        self._backend.report.name = name.rpartition("<locals>.")[2]
        optimize = torch._dynamo.optimize(
            backend=self._backend,
            nopython=fullgraph,
            dynamic=dynamic,
            recompile_limit=_MAX_RECOMPILATIONS,
            isolate_recompiles=True,
        )
        self._compiled = optimize(function)

    def __call__(self, *args, **kwargs):
        """Run as the original would."""
        if self._folder is None or eval_frame._stance.stance == "force_eager":
            return self._capture_and_run(args, kwargs)
        form = call_form(args, kwargs)
        if form is None:
            self._forget("the call has arguments that cannot be compared")
            return self._capture_and_run(args, kwargs)
        leaves, text = form
        if text in self._captured or not self._is_known():
            return self._capture_and_run(args, kwargs)
        stored = self._stored.get(text)
        if stored is None or not stored.reads.holds():
            stored = self._look_up(text)
        if stored is not None:
            return self._run_stored(stored, leaves)
        return self._capture_and_store(args, kwargs, leaves, text)

    def report(self) -> Report:
        """What was compiled so far."""
        return self._backend.report

    def __getattr__(self, name: str):
        """Attributes of the original: parameters(), state_dict(), train(), ..."""
        if name.startswith("__") or "original" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.original, name)

    def __deepcopy__(self, memo: dict) -> "Jitted":
        """A copy of the original, not compiled yet."""
        return Jitted(copy.deepcopy(self.original, memo), **self._options)

    def _capture_and_run(self, args: tuple, kwargs: dict):
        watch = Watch()
        is_first, self._has_run = not self._has_run, True
        try:
            with (
                torch._dynamo.config.patch(_DYNAMO_OPTIONS),
                collector_paused() if is_first else nullcontext(),
            ):
                return self._compiled(*args, **kwargs)
        except exc.TorchRuntimeError as error:
            if watch.breaks():
                raise
            # Nothing of it ran yet. If the program itself is wrong, say in its shapes, let it raise
            # its own error, from its own line; if it is not, say what ran without being compiled.
            result = self.original(*args, **kwargs)
            self._backend.report.note_break(make_break(str(error), error.real_stack or ()))
            return result
        finally:
            if watch.saw_anything():
                self._backend.report.note(watch)

    def _is_known(self) -> bool:
        """Whether the program has a fingerprint that still holds."""
        if self._found is None:
            try:
                self._found = fingerprint(self.original)
            except Uncacheable as reason:
                self._forget(str(reason))
                return False
        if not self._found.is_current():
            # Something was replaced since: look at the program again before trusting what is kept.
            self._found = None
            self._stored.clear()
            return self._is_known()
        return True

    def _forget(self, reason: str) -> None:
        """Leave the cache alone from now on."""
        self._backend.report.notes.append(f"not kept in the compile cache: {reason}")
        self._folder, self._found = None, None
        self._stored.clear()

    def _look_up(self, text: str) -> "_Stored | None":
        assert self._found is not None
        assert self._folder is not None
        entry = load(self._folder, self._key(text))
        if entry is None:
            return None
        reads = compare(entry.reads, self._found)
        if reads is None:
            return None  # something else is read here: captured anew
        try:
            runnable = Runnable(entry.schedule)
        except GraphError:
            return None  # an operator that is not there: captured anew
        report = self._backend.report
        report.from_cache = True
        report.note_islands(entry.schedule, runnable.islands)
        report.graphs.append(entry.graph)
        self._stored[text] = _Stored(entry, runnable, reads)
        return self._stored[text]

    def _key(self, text: str) -> str:
        assert self._found is not None
        return key_of(self._found, text, self._backend.level, self._dynamic)

    def _mark_other_sizes(self, leaves: list) -> None:
        """A size that a stored call had otherwise is any size, as for Dynamo at its second call."""
        if self._dynamic is False:
            return
        for before, leaf in zip(self._stored_sizes, leaves, strict=False):
            if before is None or not isinstance(leaf, Tensor) or len(before) != leaf.dim():
                continue
            for dim, (old, new) in enumerate(zip(before, leaf.shape, strict=True)):
                if old != new:
                    torch._dynamo.maybe_mark_dynamic(leaf, dim)

    def _run_stored(self, stored: "_Stored", leaves: list):
        assert self._found is not None
        self._stored_sizes = [x.shape if isinstance(x, Tensor) else None for x in leaves]
        entry, runnable = stored.entry, stored.runnable
        known = {"t": self._found.values(), "a": leaves}
        outputs = runnable(*(known[source[0]][int(source[1:])] for source in entry.sources))
        known["o"] = list(outputs)
        found = [
            known[leaf[1]][int(leaf[2:])] if isinstance(leaf, str) and leaf[0] == "@" else leaf
            for leaf in entry.leaves
        ]
        return pytree.tree_unflatten(found, pytree.treespec_loads(entry.result))

    def _capture_and_store(self, args: tuple, kwargs: dict, leaves: list, text: str):
        report = self._backend.report
        num_graphs, watch = report.num_graphs, Watch()
        self._backend.frames.clear()
        self._captured.add(text)
        self._mark_other_sizes(leaves)
        key = self._key(text)
        self._backend.storing = self._found
        try:
            result = self._capture_and_run(args, kwargs)
        finally:
            self._backend.storing = None
        if report.num_graphs == num_graphs and not self._backend.frames:
            return result  # compiled before: Dynamo's guards chose among what is there
        frames = self._backend.frames
        if len(frames) == 1 and report.num_graphs == num_graphs + 1 and not watch.breaks():
            self._store(key, result, leaves)
        else:
            self._forget("the program is not one graph without side effects")
        for frame in frames:
            frame.results = None  # the compiled code holds the frame; it must not hold the results
        frames.clear()
        return result

    def _store(self, key: str, result: object, leaves: list) -> None:
        assert self._found is not None
        assert self._folder is not None
        (frame,) = self._backend.frames
        if frame.obstacle:
            self._forget(frame.obstacle)
            return
        found = {id(x): f"a{i}" for i, x in enumerate(leaves) if isinstance(x, Tensor)}
        found = {number: f"t{i}" for number, i in self._found.places.items()} | found
        sources = [found[number] for number in frame.input_ids if number in found]
        if len(sources) < len(frame.input_ids) or not self._found.is_current():
            self._forget("the program reads or changes what is not among its own attributes")
            return
        outputs = {id(x): f"o{i}" for i, x in enumerate(frame.results or ())}
        flat, spec = pytree.tree_flatten(result)
        kept = []
        for leaf in flat:
            place = outputs.get(id(leaf)) or found.get(id(leaf))
            if place is not None:
                kept.append(f"@{place}")
            elif leaf is None or type(leaf) in (bool, int, float):
                kept.append(leaf)
            else:
                self._forget(f"the result holds a {type(leaf).__name__}")
                return
        try:
            entry = Entry(
                schedule=frame.schedule,
                sources=sources,
                result=pytree.treespec_dumps(spec),
                leaves=kept,
                graph=frame.graph,
                reads=frame.reads,
            )
            save(Path(self._folder), key, entry, self._found.files | frame.files)
        except (NotImplementedError, ValueError, GraphError, OSError) as error:
            self._forget(str(error))
