"""`plait debug`: run a script and look into the programs that are compiled in it."""

import code
import multiprocessing
import os
import random
import runpy
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from plait.cli.output import say, show
from plait.errors import GraphError
from plait.executor.compare_eager import EagerRun, EagerSearch
from plait.executor.debug import Breakpoint, Dump, Listing, check_is_known
from plait.executor.not_finite import NotFiniteFound, NotFiniteSearch
from plait.executor.observe import Lookout, Sighting, Watch, observing
from plait.executor.record import Recording
from plait.executor.record import compare as compare_recordings
from plait.executor.statistics import describe_value
from plait.graph.place import walk
from plait.graph.schedule import Schedule

EAGER = "eager"


def debug_command(
    script: Annotated[Path, typer.Argument(help="Python script.")],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="The script's own arguments, after --.")
    ] = None,
    nan: Annotated[bool, typer.Option("--nan", help="Find where NaN or Inf is made.")] = False,
    break_at: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP|FILE:LINE", help="Open a prompt after this step."),
    ] = None,
    dump: Annotated[Path | None, typer.Option(help="Write tensors into this folder.")] = None,
    tensors: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Steps to dump, such as 'forward/*/addmm*'."),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Keep what every step makes in this file.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="eager|FILE",
            help="Find the first step that differs from eager PyTorch, which runs the script too, "
            "or from a run that --record kept.",
        ),
    ] = None,
) -> None:
    """Run a script, and look into what plait.jit or torch.compile(backend="plait") compiles in it.

    Without options, lists every operator of the first run of each program, with what it made.

    Example: plait debug train.py --nan -- --steps 10
    """
    if tensors and dump is None:
        raise GraphError("--tensors chooses what to dump. Give the folder too: --dump DIR.")
    if not script.is_file():
        raise GraphError(f"there is no script {str(script)!r}.")
    command = [str(script), *(arguments or [])]
    session = Session()
    if nan:
        session.search_nan()
    if compare == EAGER:
        session.search_difference(_eager_run(command))
    elif compare is not None:
        session.compare(Recording.load(compare))
    if record is not None:
        session.record(record)
    for where in break_at or []:
        session.watches.append(Breakpoint(where, prompt).watch)
    if dump is not None:
        session.dump(dump, tuple(tensors or ("*",)))
    if not session.watches:
        session.watches.append(Listing(show).watch)
    if compare is not None or record is not None:
        _seed()
    _watch(command, session)
    for pattern in (*(break_at or ()), *(tensors or ())):
        check_is_known(pattern, session.schedules)


@dataclass
class Session:
    """Every schedule that a script loads, who watches them, and what they will report."""

    watches: list[Watch] = field(default_factory=list)
    arrivals: list[Watch] = field(default_factory=list)
    reports: list[Callable[[], str]] = field(default_factory=list)
    schedules: list[Schedule] = field(default_factory=list)

    def observe(self, schedule: Schedule) -> Lookout:
        """Watch a schedule, under a number and its first line."""
        self.schedules.append(schedule)
        sources = (place.step.source for place in walk(schedule) if place.step.source)
        source = next(sources, "").partition(": ")[0]
        graph = f"graph {len(self.schedules)}{f' ({source})' if source else ''}"
        return Lookout(schedule, self.watches, self.arrivals, graph)

    def search_nan(self) -> None:
        """Find the first NaN, and end the run there."""
        search = NotFiniteSearch()
        self.watches.append(search.step)
        self.arrivals.append(search.arrival)
        self.reports.append(lambda: str(search))

    def search_difference(self, eager: EagerRun) -> None:
        """Find the first step that eager did not make."""
        search = EagerSearch(eager)
        self.watches.append(search.watch)
        self.reports.append(lambda: str(search))

    def record(self, path: Path) -> None:
        """Keep what every step makes, and write it at the end."""
        recording = Recording()
        self.watches.append(recording.watch)
        self.reports.append(lambda: _saved(recording, path))

    def compare(self, before: Recording) -> None:
        """Compare every step with that of another run."""
        recording = Recording()
        self.watches.append(recording.watch)
        self.reports.append(lambda: str(compare_recordings(before, recording)))

    def dump(self, folder: Path, patterns: tuple[str, ...]) -> None:
        """Write the steps that a pattern means."""
        dumped = Dump(folder, patterns)
        self.watches.append(dumped.watch)
        self.reports.append(lambda: f"{len(dumped.files)} steps written to {folder}")


def _saved(recording: Recording, path: Path) -> str:
    recording.save(path)
    return f"{len(recording.records)} steps kept in {path}"


def prompt(sighting: Sighting) -> None:
    """Show a step, and open a Python prompt that has it."""
    lines = [str(sighting)]
    lines += [f"    took {name} = {describe_value(x)}" for name, x in sighting.operands.items()]
    lines += [f"    made {describe_value(sighting.value)}"]
    lines += ["value, operands and step are here. Ctrl-D goes on, exit() ends the run."]
    names = {
        "value": sighting.value,
        "operands": sighting.operands,
        "step": sighting.place.step,
        "sighting": sighting,
        "torch": torch,
    }
    code.interact("\n".join(lines), local=names, exitmsg="")


def _watch(command: list[str], session: Session) -> None:
    """Run the script under observation; what was found is shown however the script ends."""
    has_raised = False
    try:
        with observing(session.observe):
            _run(command)
    except NotFiniteFound:
        say("stopped at the first NaN")
    except Exception as error:
        has_raised = True
        _show_traceback(error, command[0])
    finally:
        if not session.schedules:
            say("no compiled program was loaded: is plait.jit or torch.compile used and called?")
        for report in session.reports:
            show(report())
    if has_raised:
        raise typer.Exit(1)


def _run(command: list[str]) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` would."""
    with _as_main(command):
        runpy.run_path(command[0], run_name="__main__")


def _show_traceback(error: Exception, script: str) -> None:
    """As Python would for the script: without our own frames before it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename != script:
        trace = trace.tb_next
    traceback.print_exception(error.with_traceback(trace or error.__traceback__))


@contextmanager
def _as_main(command: list[str]) -> Iterator[None]:
    arguments, paths = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = command, [str(Path(command[0]).resolve().parent)]
    try:
        yield
    finally:
        sys.argv, sys.path[:] = arguments, paths


def _eager_run(command: list[str]) -> EagerRun:
    """Run the script with eager PyTorch in another process, and return what it computed."""
    say("running with eager PyTorch first")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "eager.pt"
        process = multiprocessing.get_context("spawn").Process(target=_eager, args=(command, path))
        process.start()
        process.join()
        if not path.exists():
            raise GraphError("the script ended early with eager PyTorch too; see above.")
        stored = torch.load(path, weights_only=True)
    return EagerRun(known={bytes.fromhex(x) for x in stored["known"]}, made=stored["made"])


def _eager(command: list[str], path: Path) -> None:
    torch.compiler.set_stance("force_eager")
    _seed()
    eager = EagerRun()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # noqa: PTH123
        try:
            with eager.recorded():
                _run(command)
        except SystemExit as ended:
            if ended.code:
                raise
    torch.save({"known": [x.hex() for x in eager.known], "made": eager.made}, path)


def _seed() -> None:
    """Both runs begin alike, whether or not the script seeds."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the script's own generator, whichever it uses)
    torch.manual_seed(0)
