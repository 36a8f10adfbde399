"""Score a model on the held-out text of a run, or on any files, beside xz."""

from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from plait.checkpoint.huggingface import end_tokens, load_tokenizer
from plait.checkpoint.json_file import read_json_object, write_json
from plait.config import from_json, to_json
from plait.errors import CheckpointError, ConfigError, DataError
from plait.models.decoder import Decoder
from plait.train.corpus import Corpus, CorpusSettings, find_corpus, num_bytes
from plait.train.data import read_tokens, write_tokens
from plait.train.evaluate import Evaluation, Scoring, evaluate
from plait.train.job import Job
from plait.train.prepare import tokens_of
from plait.train.run_folder import RunFolder
from plait.train.watch import Watch
from plait.train.xz import XzBaseline, compress_with_xz


@dataclass(frozen=True)
class Score:
    """An evaluation, how it was made, and the yardstick (None if the files have changed since)."""

    evaluation: Evaluation
    scoring: Scoring
    xz: XzBaseline | None

    def to_json(self) -> dict[str, Any]:
        """Lay out everything for `--json` and `evaluation.json`."""
        return {
            "bits_per_byte": self.evaluation.bits_per_byte,
            "perplexity": self.evaluation.perplexity,
            "num_bytes": self.evaluation.num_bytes,
            "num_tokens": self.evaluation.num_tokens,
            "xz": None if self.xz is None else asdict(self.xz),
            "scoring": to_json(self.scoring),
        }


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
            f"Finish it with plait train {run.read_any_job().name} --resume {path}."
        )
    return folders[-1]


def scoring_of(job: Job) -> Scoring:
    """How a run's final evaluation reads the text."""
    return Scoring(context=job.sequence_length, stride=job.evaluation.stride, dtype=job.dtype)


def score_run(run: RunFolder, model: Decoder, scoring: Scoring, watch: Watch) -> Score:
    """Score a run's held-out text; the result stays in its folder."""
    _, heldout = tokens_of(run)
    (end_of_text,) = end_tokens(run.tokenizer)
    evaluation = evaluate(
        model,
        heldout,
        num_bytes=run.read_corpus()["num_bytes"]["heldout"],
        scoring=scoring,
        end_of_text=end_of_text if run.read_job().document_boundaries else None,
        on_progress=watch.on_progress,
    )
    score = Score(evaluation, scoring, _xz_of(run, watch))
    write_json(run.evaluation, score.to_json())
    return score


def score_files(model: Decoder, folder: Path, data: str, scoring: Scoring, watch: Watch) -> Score:
    """Score all text under `data` with a model and the tokenizer in its folder."""
    documents = find_corpus(data, CorpusSettings(), split=False).heldout
    tokenizer = load_tokenizer(folder)
    ends = end_tokens(folder)
    vocab_size = tokenizer.get_vocab_size()
    if not ends:
        raise CheckpointError(f"{folder} names no token that ends a text (eos_token).")
    if vocab_size > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {vocab_size} tokens, "
            f"the model {model.config.vocab_size}: they do not belong together."
        )
    with TemporaryDirectory() as temporary:
        path = Path(temporary) / "tokens.bin"
        write_tokens(documents, tokenizer, path, end_of_text=ends[0])
        evaluation = evaluate(
            model,
            read_tokens(path, vocab_size=vocab_size),
            num_bytes=num_bytes(documents),
            scoring=scoring,
            on_progress=watch.on_progress,
        )
    watch.on_stage("compressing the same text with xz")
    return Score(evaluation, scoring, compress_with_xz((), documents))


def _xz_of(run: RunFolder, watch: Watch) -> XzBaseline | None:
    """Compress the run's corpus once."""
    if run.xz.is_file():
        return from_json(XzBaseline, read_json_object(run.xz))
    watch.on_stage("compressing the same text with xz")
    corpus = _same_corpus(run)
    if corpus is None:
        watch.on_stage("the data are rows, or have changed, so there is no xz baseline for them")
        return None
    baseline = compress_with_xz(corpus.train, corpus.heldout)
    write_json(run.xz, asdict(baseline))
    return baseline


def _same_corpus(run: RunFolder) -> Corpus | None:
    job = run.read_job()
    if run.read_corpus().get("rows"):
        return None  # xz compresses files, and these are rows
    try:
        corpus = find_corpus(job.data, job.corpus)
    except DataError:
        return None
    return corpus if corpus.sha256 == run.read_corpus()["sha256"] else None
