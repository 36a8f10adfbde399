"""`plait train`: run a recipe, show how it goes, measure and sample what came out."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from plait.cli.evaluate import evaluate_run, evaluation_rows
from plait.cli.output import duration, progress_console, say, show, show_json, show_table
from plait.cli.sample import complete
from plait.config import override
from plait.errors import ConfigError
from plait.recipes.catalog import RECIPES, find_recipe
from plait.serve.sampling import Sampling
from plait.train.job import Job
from plait.train.loop import Record, TrainResult, Watch, train
from plait.train.report import write_report
from plait.train.run_folder import RunFolder

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
    with _stop_on_interrupt() as stop, _Display(job) as display:
        watch = Watch(
            on_record=display.on_record, on_stage=display.on_stage, should_stop=stop.is_set
        )
        result = train(job, run, watch)
    if not result.finished:
        _report(job, run, [], "")
        say(f"stopped at step {result.step} of {job.num_steps}, saved. Continue with:")
        say(f"  plait train {recipe} --resume {run.path}")
        raise typer.Exit(_STOPPED)
    _finish(job, run, result, as_json=as_json)


def _open_run(
    recipe: str, settings: list[str], out: Path | None, resume: Path | None
) -> tuple[Job, RunFolder]:
    job = override(find_recipe(recipe), settings)
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
    number = 1
    while (path := Path("runs") / f"{recipe}-{number}").exists():
        number += 1
    return path


def _finish(job: Job, run: RunFolder, result: TrainResult, *, as_json: bool) -> None:
    say("evaluating the held-out text")
    evaluation = evaluate_run(run, result.model)
    sample = complete(run.model, job.prompt, Sampling(), model=result.model)
    records = [record for record in run.read_metrics() if "loss" in record]
    num_tokens = result.step * job.batch_size * job.sequence_length
    elapsed_s = records[-1]["elapsed_s"]
    rows = [
        ("parameters", f"{sum(p.numel() for p in result.model.parameters()) / 1e6:.1f} million"),
        ("trained on", f"{num_tokens / 1e6:.1f} million tokens in {duration(elapsed_s)}"),
        ("speed", f"{num_tokens / elapsed_s:,.0f} tokens/s"),
        *evaluation_rows(evaluation),
    ]
    _report(job, run, rows, sample)
    if as_json:
        show_json(
            {
                "run": str(run.path),
                "step": result.step,
                "train_s": elapsed_s,
                **evaluation,
                "sample": sample,
            }
        )
        return
    show_table([*rows, ("model", str(run.model)), ("report", str(run.report))])
    show(f"\nsample:\n{sample}")


def _report(job: Job, run: RunFolder, rows: list[tuple[str, str]], sample: str) -> None:
    run.report.write_text(write_report(job, run.read_metrics(), rows, sample))


class _Stop:
    """Set by the first Ctrl-C; the second one interrupts at once."""

    def __init__(self) -> None:
        self._asked = False

    def is_set(self) -> bool:
        return self._asked

    def ask(self, signal_number: int, frame: FrameType | None) -> None:
        if self._asked:
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
