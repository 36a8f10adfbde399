"""From files to tokens on disk: what a run does once, before its first step."""

import warnings

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from plait.checkpoint.huggingface import end_tokens, load_tokenizer
from plait.checkpoint.json_file import write_json
from plait.errors import CheckpointError, ConfigError
from plait.train.corpus import find_corpus, num_bytes
from plait.train.data import read_tokens, write_tokens
from plait.train.job import Job
from plait.train.run_folder import RunFolder
from plait.train.tokenizer import save_tokenizer, train_tokenizer
from plait.train.watch import Watch


def prepare(job: Job, run: RunFolder, watch: Watch) -> None:
    """Write tokenizer, tokens and `corpus.json`, unless the run has them already.

    Raises DataError for unusable data, ConfigError for a prompt that the model cannot take.
    """
    if run.corpus.exists():
        return
    watch.on_stage(f"reading {job.data}")
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
