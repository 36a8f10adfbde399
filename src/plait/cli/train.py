"""`plait train`: run a recipe, show how it goes, measure and sample what came out."""

import contextlib
import itertools
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from plait.checkpoint.json_file import write_text
from plait.cli.evaluate import score_rows, scoring_progress
from plait.cli.output import duration, progress_console, say, show, show_json, show_table
from plait.cli.sample import complete
from plait.config import override
from plait.errors import ConfigError
from plait.recipes.catalog import RECIPES, find_recipe
from plait.serve.sampling import Sampling
from plait.train.job import Job
from plait.train.loop import TrainResult, train
from plait.train.report import render_report
from plait.train.run_folder import RunFolder
from plait.train.score import score_run, scoring_of
from plait.train.watch import Record, Watch

_STOPPED = 130


def train_command(
    recipe: Annotated[str, typer.Argument(help=f"One of: {', '.join(RECIPES)}.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="Change one field of the job."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/RECIPE-N.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to continue.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a model, evaluate it and sample from it.

    Example: plait train stdlib_demo --set data=my_texts --set num_steps=500
    """
    job, run = _open_run(recipe, settings or [], out, resume)
    say(f"run folder: {run.path}")
    how_to_resume = f"  plait train {recipe} --resume {shlex.quote(str(run.path))}"
    try:
        with _stop_on_interrupt() as stop, _Display(job) as display:

            def on_record(record: Record) -> None:
                stop.defer()
                display.on_record(record)

            watch = Watch(on_record=on_record, on_stage=display.on_stage, should_stop=stop.is_set)
            result = train(job, run, watch)
        if result.finished:
            _finish(job, run, result, as_json=as_json)
            return
    except KeyboardInterrupt:
        say("interrupted. Continue with:")
    else:
        _report(job, run, [], "")
        say(f"stopped at step {result.step} of {job.num_steps}, saved. Continue with:")
    say(how_to_resume)
    raise typer.Exit(_STOPPED)


def _open_run(
    recipe: str, settings: list[str], out: Path | None, resume: Path | None
) -> tuple[Job, RunFolder]:
    job = override(find_recipe(recipe), settings)
    if job.name != recipe:
        raise ConfigError("--set name: the name of a job is that of its recipe.")
    if resume is None:
        run = RunFolder(out or _free_folder(recipe))
        run.write_job(job)
        return job, run
    if settings or out:
        raise ConfigError(
            "a run is continued with its own settings: leave --set and --out away, "
            "or start a new run."
        )
    run = RunFolder(resume)
    job = run.read_job()
    if job.name != recipe:
        raise ConfigError(
            f"{resume} is a run of {job.name}, not of {recipe}. Continue it with its own name."
        )
    return job, run


def _free_folder(recipe: str) -> Path:
    """Take the first free number; making the folder is what claims it."""
    for number in itertools.count(1):
        path = Path("runs") / f"{recipe}-{number}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("itertools.count ends nowhere")


def _finish(job: Job, run: RunFolder, result: TrainResult, *, as_json: bool) -> None:
    say("evaluating the held-out text")
    _report(job, run, [], "")  # should anything go wrong from here on, the curve is there
    with scoring_progress() as watch:
        score = score_run(run, result.model, scoring_of(job), watch)
    sample = "".join(complete(result.model, run.model, job.prompt, Sampling()))
    num_tokens = result.step * job.batch_size * job.sequence_length
    rows = [
        ("parameters", f"{sum(p.numel() for p in result.model.parameters()) / 1e6:.1f} million"),
        ("trained on", f"{num_tokens / 1e6:.1f} million tokens in {duration(result.elapsed_s)}"),
        ("speed", f"{num_tokens / result.elapsed_s:,.0f} tokens/s"),
        *score_rows(score),
    ]
    _report(job, run, rows, sample)
    if as_json:
        facts = {"run": str(run.path), "step": result.step, "train_s": result.elapsed_s}
        show_json(facts | score.to_json() | {"sample": sample})
        return
    show_table([*rows, ("model", str(run.model)), ("report", str(run.report))])
    show(f"\nsample:\n{sample}")


def _report(job: Job, run: RunFolder, rows: list[tuple[str, str]], sample: str) -> None:
    write_text(run.report, render_report(job, run.read_metrics(), rows, sample))


class _Stop:
    """Ctrl-C: while steps are made, the first one asks to stop; elsewhere it interrupts at once."""

    def __init__(self) -> None:
        self._asked = self._deferring = False

    def defer(self) -> None:
        self._deferring = True

    def is_set(self) -> bool:
        return self._asked

    def ask(self, signal_number: int, frame: FrameType | None) -> None:
        if self._asked or not self._deferring:
            raise KeyboardInterrupt
        self._asked = True
        say("stopping after this step and saving; press Ctrl-C again to stop at once")


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[_Stop]:
    stop = _Stop()
    before = signal.signal(signal.SIGINT, stop.ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class _Display:
    """Progress on stderr: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._live = sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=progress_console(),
            disable=not self._live,
        )
        self._task = self._progress.add_task("starting", total=job.num_steps, facts="")
        self._heldout = ""
        self._mean_tokens_per_s = 0.0

    def __enter__(self) -> "_Display":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_stage(self, text: str) -> None:
        if self._live:
            self._progress.update(self._task, description=text)
        else:
            say(text)

    def on_record(self, record: Record) -> None:
        if "loss" in record:
            self._on_step(record)
        else:
            self._heldout = f"held-out {record['heldout_loss']:.3f}"
            if not self._live:
                say(
                    f"step {record['step']}: {self._heldout} nats/token, "
                    f"{record['heldout_bits_per_byte']:.3f} bits/byte"
                )

    def _on_step(self, record: dict[str, Any]) -> None:
        step, job = record["step"], self._job
        speed = record["tokens_per_s"]
        self._mean_tokens_per_s = (
            0.9 * self._mean_tokens_per_s + 0.1 * speed if self._mean_tokens_per_s else speed
        )
        left_s = (
            (job.num_steps - step) * job.batch_size * job.sequence_length / self._mean_tokens_per_s
        )
        speed = f"{self._mean_tokens_per_s:,.0f} tokens/s"
        facts = f"loss {record['loss']:.3f}  {speed}  {duration(left_s)} left"
        if self._live:
            self._progress.update(
                self._task,
                completed=step,
                description="training",
                facts=f"{facts}  {self._heldout}",
            )
        elif step == 1 or step % max(1, job.num_steps // 20) == 0:
            say(f"step {step} of {job.num_steps}: {facts}")
