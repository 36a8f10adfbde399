"""`plait evaluate`: bits per byte of a model, beside those of xz."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from plait.checkpoint.huggingface import load_model
from plait.cli.output import progress_console, say, show_json, show_table
from plait.config import override
from plait.errors import ConfigError
from plait.train.evaluate import Scoring
from plait.train.run_folder import RunFolder
from plait.train.score import Score, score_files, score_run, scoring_of, trained_model
from plait.train.tuning_job import TuningJob
from plait.train.watch import Watch


def evaluate_command(
    model: Annotated[
        Path, typer.Argument(help="Run folder, or a model folder in the layout of Hugging Face.")
    ],
    data: Annotated[
        str | None,
        typer.Option(help="File or folder to score; default the run's held-out text."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="PATH=VALUE", help="context, stride or dtype."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Score text with a model: perplexity, bits per byte, and what xz makes of the same text.

    Example: plait evaluate runs/stdlib_demo-1 --set stride=128
    """
    run, folder = RunFolder(model), trained_model(model)
    is_run = run.resolved.is_file()
    if data is None and not is_run:
        raise ConfigError(
            f"{model} is not a run folder, so it has no held-out text. Name some with --data."
        )
    if is_run and folder != run.model:
        say(f"this run is not finished; taking {folder.name}")
    decoder = load_model(folder)
    context = min(512, decoder.config.max_positions)
    default = Scoring(context=context, stride=max(1, context // 2))
    is_pretraining = is_run and (data is None or not isinstance(run.read_any_job(), TuningJob))
    scoring = override(scoring_of(run.read_job()) if is_pretraining else default, settings or [])
    with scoring_progress() as watch:
        if data is None:
            score = score_run(run, decoder, scoring, watch)
        else:
            score = score_files(decoder, folder, data, scoring, watch)
    if as_json:
        show_json(score.to_json())
    else:
        show_table(score_rows(score))


@contextmanager
def scoring_progress() -> Iterator[Watch]:
    """Show a bar on stderr while text is scored."""
    with Progress(console=progress_console(), transient=True) as progress:
        task = progress.add_task("scoring", total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield Watch(on_stage=progress.console.print, on_progress=on_progress)


def score_rows(score: Score) -> list[tuple[str, str]]:
    """Lay out a score for a table."""
    evaluation, xz = score.evaluation, score.xz
    rows = [
        ("held-out text", f"{evaluation.num_bytes:,} bytes, {evaluation.num_tokens:,} tokens"),
        ("perplexity", f"{evaluation.perplexity:.2f} per token"),
        ("bits per byte", f"{evaluation.bits_per_byte:.4f}"),
    ]
    if xz is not None:
        verdict = "beaten" if evaluation.bits_per_byte < xz.solid else "not beaten"
        rows.append(("xz -9e, all in one", f"{xz.solid:.4f}  ({verdict})"))
        rows.append(("xz -9e, each file", f"{xz.per_file:.4f}"))
        if xz.conditional is not None:
            rows.append(("xz -9e, after the training text", f"{xz.conditional:.4f}"))
    return rows
