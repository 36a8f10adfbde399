"""From files to tokens on disk: what a run does once, before its first step."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from plait.checkpoint.huggingface import end_tokens, load_tokenizer
from plait.checkpoint.json_file import read_json_object, write_json
from plait.errors import CheckpointError, ConfigError
from plait.train.corpus import CorpusSettings, find_corpus, num_bytes
from plait.train.data import read_tokens, write_tokens
from plait.train.job import Job
from plait.train.prepare_rows import encode_heldout, holds_rows, prepare_rows
from plait.train.row_files import file_hashes
from plait.train.rows import row_files
from plait.train.run_folder import RunFolder
from plait.train.tokenizer import save_tokenizer, train_tokenizer
from plait.train.watch import Watch


@dataclass(frozen=True)
class HeldOut:
    """Tokens to score, and the bytes of text that they stand for."""

    tokens: NDArray[np.integer]
    num_bytes: int


def prepare(job: Job, run: RunFolder, watch: Watch) -> None:
    """Write tokenizer, tokens and `corpus.json`, unless the run has them already.

    Raises DataError for unusable data, ConfigError for a prompt that the model cannot take.
    """
    if run.corpus.exists():
        return
    if holds_rows(job.data):
        prepare_rows(job, run, watch)
        _check(load_tokenizer(run.tokenizer), job)
    else:
        _prepare_files(job, run, watch)


def prepare_more(job: Job, run: RunFolder, watch: Watch) -> dict[str, HeldOut]:
    """Encode the further evaluation sets, unless the run has them; returns them by name."""
    vocab_size = run.read_corpus()["vocab_size"]
    sets: dict[str, HeldOut] = {}
    for data in job.evaluation.more:
        name = Path(data).stem
        if name in sets:
            raise ConfigError(f"evaluation.more has two sets called {name!r}.")
        path = run.heldout_tokens.with_name(f"more-{name}.bin")
        facts = path.with_suffix(".json")
        if not facts.exists():
            watch.on_stage(f"encoding {data}")
            write_json(facts, _encode_more(job, run, data, path, watch))
        tokens = read_tokens(path, vocab_size=vocab_size)
        sets[name] = HeldOut(tokens, read_json_object(facts)["num_bytes"])
    return sets


def _encode_more(
    job: Job, run: RunFolder, data: str, path: Path, watch: Watch
) -> dict[str, object]:
    """Encode one set of rows or of text files; returns what it is and its size."""
    if holds_rows(data):
        size = encode_heldout(job, run, data, path, watch)
        return {"path": data, "files": file_hashes(data), "num_bytes": size}
    corpus = find_corpus(data, CorpusSettings(undecodable=job.corpus.undecodable), split=False)
    tokenizer = load_tokenizer(run.tokenizer)
    (end_of_text,) = end_tokens(run.tokenizer)
    write_tokens(corpus.heldout, tokenizer, path, end_of_text=end_of_text)
    files = {document.name: document.sha256 for document in corpus.heldout}
    return {"path": data, "files": files, "num_bytes": num_bytes(corpus.heldout)}


def _prepare_files(job: Job, run: RunFolder, watch: Watch) -> None:
    watch.on_stage(f"reading {job.data}")
    if Path(job.data).is_dir() and (rows := row_files(Path(job.data))):
        watch.on_stage(
            f"{job.data} holds {len(rows)} files of rows, such as {rows[0].name}, beside others: "
            "all are read as plain text. To read rows, name a folder of nothing else"
        )
    corpus = find_corpus(job.data, job.corpus)
    watch.on_stage(f"learning a vocabulary of {job.model.vocab_size:,} tokens")
    save_tokenizer(
        train_tokenizer(corpus.train, vocab_size=job.model.vocab_size),
        run.tokenizer,
        max_positions=job.model.max_positions,
    )
    tokenizer = load_tokenizer(run.tokenizer)
    _check(tokenizer, job)
    sizes = {"train": num_bytes(corpus.train), "heldout": num_bytes(corpus.heldout)}
    watch.on_stage(f"encoding {sum(sizes.values()) / 1e6:.1f} MB")
    run.train_tokens.parent.mkdir(exist_ok=True)
    (end_of_text,) = end_tokens(run.tokenizer)
    counts = {
        "train": write_tokens(corpus.train, tokenizer, run.train_tokens, end_of_text=end_of_text),
        "heldout": write_tokens(
            corpus.heldout, tokenizer, run.heldout_tokens, end_of_text=end_of_text
        ),
    }
    facts = {"vocab_size": tokenizer.get_vocab_size(), "num_tokens": counts, "num_bytes": sizes}
    write_json(run.corpus, corpus.describe() | facts)


def tokens_of(run: RunFolder) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Tokens of the train and of the held-out side of a prepared run."""
    corpus = run.read_corpus()
    sides: list[NDArray[np.integer]] = []
    for side, path in (("train", run.train_tokens), ("heldout", run.heldout_tokens)):
        expected = corpus["num_tokens"][side]
        tokens = read_tokens(path, vocab_size=corpus["vocab_size"]) if path.is_file() else None
        if tokens is None or len(tokens) != expected:
            raise CheckpointError(
                f"{path} does not hold the {expected} tokens that were written. "
                "Start the run again."
            )
        sides.append(tokens)
    return sides[0], sides[1]


def _check(tokenizer: Tokenizer, job: Job) -> None:
    found, wanted = tokenizer.get_vocab_size(), job.model.vocab_size
    if found < wanted:
        warnings.warn(
            f"this text yields {found} tokens only; {wanted - found} rows of the embedding stay "
            f"unused. --set model.vocab_size={found} would save them",
            stacklevel=2,
        )
    length = len(tokenizer.encode(job.prompt).ids)
    if not 0 < length < job.model.max_positions:
        raise ConfigError(
            f"prompt={job.prompt!r} has {length} tokens; it needs at least 1 and fewer than "
            f"model.max_positions={job.model.max_positions}."
        )
