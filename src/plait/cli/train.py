"""`plait train`: run a recipe, show how it goes, measure and sample what came out."""

import itertools
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from plait.checkpoint.json_file import write_text
from plait.cli.evaluate import score_rows, scoring_progress
from plait.cli.output import duration, progress_console, say, show, show_json, show_table
from plait.cli.sample import complete
from plait.cli.stop import stop_on_interrupt
from plait.config import override
from plait.errors import ConfigError, PlaitError
from plait.executor.host_memory import keep_freed_memory
from plait.recipes.catalog import RECIPES, find_recipe
from plait.serve.sampling import Sampling
from plait.train.job import Job
from plait.train.loop import TrainResult, train
from plait.train.report import render_report
from plait.train.run_folder import RunFolder
from plait.train.score import score_run, scoring_of
from plait.train.tune import tune
from plait.train.tuning_job import TuningJob
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
    keep_freed_memory()
    how_to_resume = f"  plait train {recipe} --resume {shlex.quote(str(run.path))}"
    try:
        with (
            stop_on_interrupt("stopping after this step and saving") as stop,
            _Display(job.num_steps) as display,
        ):

            def on_record(record: Record) -> None:
                stop.defer()
                display.on_record(record)

            watch = Watch(on_record=on_record, on_stage=display.on_stage, should_stop=stop.is_set)
            is_tuning = isinstance(job, TuningJob)
            result = tune(job, run, watch) if is_tuning else train(job, run, watch)
        if result.finished:
            if isinstance(job, TuningJob):
                _finish_tuning(job, run, result, as_json=as_json)
            else:
                _finish(job, run, result, as_json=as_json)
            return
    except PlaitError:
        if resume is None and not (run.data.exists() or run.corpus.exists()):
            shutil.rmtree(
                run.path, ignore_errors=True
            )  # nothing was begun: the same --out may be tried again
        raise
    except KeyboardInterrupt:
        say("interrupted. Continue with:")
    else:
        _report(job, run, [], "")
        say(f"stopped after step {result.step}, saved. Continue with:")
    say(how_to_resume)
    raise typer.Exit(_STOPPED)


def _open_run(
    recipe: str, settings: list[str], out: Path | None, resume: Path | None
) -> tuple[Job | TuningJob, RunFolder]:
    job = override(find_recipe(recipe), settings)
    if isinstance(job, TuningJob) and resume is None:
        job.check_ready()
    if job.name != recipe:
        raise ConfigError("--set name: the name of a job is that of its recipe.")
    if resume is None:
        run = RunFolder(out or _free_folder(recipe))
        run.write_job(job)
        if job.dtype == "auto" and job.torch_dtype == torch.float32:
            say("products in float32: this CPU has none in bfloat16")
        return run.read_any_job(), run
    if settings or out:
        raise ConfigError(
            "a run is continued with its own settings: leave --set and --out away, "
            "or start a new run."
        )
    run = RunFolder(resume)
    job = run.read_any_job()
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
        ("trained on", f"{num_tokens:,} tokens in {duration(result.elapsed_s)}"),
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


def _finish_tuning(job: TuningJob, run: RunFolder, result: TrainResult, *, as_json: bool) -> None:
    records = run.read_metrics()
    losses = [record["loss"] for record in records if "loss" in record]
    rows = [
        ("steps", f"{result.step} in {duration(result.elapsed_s)}"),
        ("loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}"),
    ]
    for key in (key for key in _last(records, "heldout_loss") if "/" in key):
        values = [record[key] for record in records if key in record]
        rows.append((key.replace("/", ", "), f"{values[0]:.4f} -> {min(values):.4f}"))
    _report(job, run, rows, "")
    if as_json:
        facts = {"run": str(run.path), "step": result.step, "train_s": result.elapsed_s}
        show_json(facts | {"loss": losses[-1], **_last(records, "heldout_loss")})
        return
    adapter = [("adapter", str(run.adapter))] if job.method == "lora" else []
    show_table([*rows, *adapter, ("model", str(run.model)), ("report", str(run.report))])


def _last(records: list[Record], key: str) -> Record:
    return next((record for record in reversed(records) if key in record), {})


def _report(job: Job | TuningJob, run: RunFolder, rows: list[tuple[str, str]], sample: str) -> None:
    write_text(run.report, render_report(job, run.read_metrics(), rows, sample))


class _Display:
    """Progress on stderr: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._live = sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            console=progress_console(),
            disable=not self._live,
        )
        self._task = self._progress.add_task("starting", total=num_steps, facts="")
        self._heldout = ""
        self._mean_tokens_per_s = self._mean_step_s = 0.0
        self._elapsed_s: float | None = None

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
                bits = record.get("heldout_bits_per_byte")
                behind = "" if bits is None else f" nats/token, {bits:.3f} bits/byte"
                say(f"step {record['step']}: {self._heldout}{behind}")

    def _on_step(self, record: dict[str, Any]) -> None:
        step, num_steps = record["step"], record.get("num_steps", self._num_steps)
        if self._elapsed_s is not None:
            seconds, mean_s = record["elapsed_s"] - self._elapsed_s, self._mean_step_s
            self._mean_step_s = 0.9 * mean_s + 0.1 * seconds if mean_s else seconds
        self._elapsed_s = record["elapsed_s"]
        speed = record["tokens_per_s"]
        self._mean_tokens_per_s = (
            0.9 * self._mean_tokens_per_s + 0.1 * speed if self._mean_tokens_per_s else speed
        )
        speed = f"{self._mean_tokens_per_s:,.0f} tokens/s"
        facts = f"loss {record['loss']:.3f}  {speed}"
        if self._mean_step_s:  # which the first step alone does not tell
            facts += f"  {duration((num_steps - step) * self._mean_step_s)} left"
        if self._live:
            self._progress.update(
                self._task,
                completed=step,
                total=num_steps,
                description="training",
                facts=f"{facts}  {self._heldout}",
            )
        elif step == 1 or step % max(1, num_steps // 20) == 0:
            say(f"step {step} of {num_steps}: {facts}")
