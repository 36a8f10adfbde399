"""`plait evaluate`: bits per byte of a model, beside those of xz."""

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from rich.progress import Progress

from plait.checkpoint.huggingface import load_model, load_tokenizer
from plait.cli.output import progress_console, say, show_json, show_table
from plait.config import from_json, override, to_json
from plait.errors import ConfigError, DataError
from plait.models.decoder import Decoder
from plait.train.corpus import Corpus, CorpusSettings, find_corpus, num_bytes
from plait.train.data import read_tokens, write_tokens
from plait.train.evaluate import Evaluation, Scoring, evaluate
from plait.train.job import Job
from plait.train.loop import tokens_of
from plait.train.run_folder import RunFolder
from plait.train.xz import XzBaseline, compress_with_xz

_Json = dict[str, Any]


def evaluate_command(
    model: Annotated[
        Path, typer.Argument(help="Run folder, or a model folder in the layout of Hugging Face.")
    ],
    data: Annotated[
        str | None, typer.Option(help="File or folder to score; default the run's held-out text.")
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
    run = RunFolder(model)
    is_run = run.resolved.is_file()
    decoder = load_model(trained_model(model))
    if data is not None:
        result = _evaluate_files(decoder, trained_model(model), data, settings or [])
    elif is_run:
        result = evaluate_run(run, decoder, settings or [])
    else:
        raise ConfigError(
            f"{model} is not a run folder, so it has no held-out text. Name some with --data."
        )
    if as_json:
        show_json(result)
    else:
        show_table(evaluation_rows(result))


def trained_model(path: Path) -> Path:
    """Folder of the model in a run, or its newest checkpoint, or `path` itself if it is no run."""
    run = RunFolder(path)
    if not run.resolved.is_file():
        return path
    if run.model.is_dir():
        return run.model
    folders = run.step_folders()
    if not folders:
        raise ConfigError(
            f"{path} has no model yet. "
            f"Finish it with plait train {run.read_job().name} --resume {path}."
        )
    say(f"this run is not finished; taking {folders[-1].name}")
    return folders[-1]


def evaluate_run(run: RunFolder, model: Decoder, settings: list[str] | None = None) -> _Json:
    """Score a run's held-out text and keep the result in its folder."""
    job = run.read_job()
    scoring = override(scoring_of(job), settings or [])
    _, heldout = tokens_of(run)
    size = run.read_corpus()["num_bytes"]["heldout"]
    result = _result(_score(model, heldout, size, scoring), scoring, _xz_of(run, job))
    run.evaluation.write_text(json.dumps(result, indent=1) + "\n")
    return result


def scoring_of(job: Job) -> Scoring:
    """How a run's final evaluation reads the text."""
    return Scoring(context=job.sequence_length, stride=job.evaluation.stride, dtype=job.dtype)


def evaluation_rows(result: _Json) -> list[tuple[str, str]]:
    """Lay out what `evaluate_run` returns for a table."""
    rows = [
        ("held-out text", f"{result['num_bytes']:,} bytes, {result['num_tokens']:,} tokens"),
        ("perplexity", f"{result['perplexity']:.2f} per token"),
        ("bits per byte", f"{result['bits_per_byte']:.4f}"),
    ]
    if (xz := result["xz"]) is not None:
        verdict = "beaten" if result["bits_per_byte"] < xz["solid"] else "not beaten"
        rows.append(("xz -9e, all in one", f"{xz['solid']:.4f}  ({verdict})"))
        rows.append(("xz -9e, each file", f"{xz['per_file']:.4f}"))
        if xz["conditional"] is not None:
            rows.append(("xz -9e, after the training text", f"{xz['conditional']:.4f}"))
    return rows


def _evaluate_files(model: Decoder, folder: Path, data: str, settings: list[str]) -> _Json:
    corpus = find_corpus(data, CorpusSettings(), split=False)
    documents = corpus.heldout
    tokenizer = load_tokenizer(folder)
    context = min(512, model.config.max_positions)
    scoring = override(Scoring(context=context, stride=max(1, context // 2)), settings)
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "tokens.bin"
        write_tokens(documents, tokenizer, path)
        tokens = read_tokens(path, vocab_size=tokenizer.get_vocab_size())
        evaluation = _score(model, tokens, num_bytes(documents), scoring)
    return _result(evaluation, scoring, compress_with_xz((), documents))


def _score(model: Decoder, tokens: Any, size: int, scoring: Scoring) -> Evaluation:
    with Progress(console=progress_console(), transient=True) as progress:
        task = progress.add_task("scoring", total=None)
        return evaluate(
            model,
            tokens,
            num_bytes=size,
            scoring=scoring,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _result(evaluation: Evaluation, scoring: Scoring, xz: XzBaseline | None) -> _Json:
    return {
        "bits_per_byte": evaluation.bits_per_byte,
        "perplexity": evaluation.perplexity,
        "num_bytes": evaluation.num_bytes,
        "num_tokens": evaluation.num_tokens,
        "xz": None if xz is None else asdict(xz),
        "scoring": to_json(scoring),
    }


def _xz_of(run: RunFolder, job: Job) -> XzBaseline | None:
    """Compress the run's corpus once; None if its files have changed since the run began."""
    if run.xz.is_file():
        return from_json(XzBaseline, json.loads(run.xz.read_text()))
    say("compressing the same text with xz")
    corpus = _same_corpus(run, job)
    if corpus is None:
        say("warning: the files of this run have changed, so there is no xz baseline for it")
        return None
    baseline = compress_with_xz(corpus.train, corpus.heldout)
    run.xz.write_text(json.dumps(asdict(baseline)) + "\n")
    return baseline


def _same_corpus(run: RunFolder, job: Job) -> Corpus | None:
    try:
        corpus = find_corpus(job.data, job.corpus)
    except DataError:
        return None
    return corpus if corpus.sha256 == run.read_corpus()["sha256"] else None
