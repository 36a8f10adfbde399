"""Pre-training on rows of text: the same files on disk as `prepare.py` makes of plain text files.

Rows are read twice, to learn a vocabulary and to encode, and never held: memory does not grow with
them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from plait.checkpoint.huggingface import end_tokens, load_tokenizer
from plait.checkpoint.json_file import write_json
from plait.errors import DataError
from plait.train.job import Job
from plait.train.row_files import file_hashes
from plait.train.rows import (
    Problem,
    Problems,
    is_row_data,
    other_files,
    read_rows,
    text_field,
)
from plait.train.run_folder import RunFolder
from plait.train.text_rows import TextEncoder, side_of, write_texts
from plait.train.tokenizer import save_tokenizer, train_tokenizer_on
from plait.train.watch import Watch


def holds_rows(data: str) -> bool:
    """Say whether data are rows: a file or a saved dataset, or a folder of nothing else.

    What is about the data, such as a README, may stand beside them.
    """
    return is_row_data(data) and not other_files(Path(data))


def prepare_rows(job: Job, run: RunFolder, watch: Watch) -> None:
    """Write tokenizer, tokens and `corpus.json`. Raises DataError for a row that has no text."""
    watch.on_stage(f"learning a vocabulary of {job.model.vocab_size:,} tokens")
    texts = _train_texts(job, Problems(job.on_bad_row))
    save_tokenizer(
        train_tokenizer_on(texts, vocab_size=job.model.vocab_size),
        run.tokenizer,
        max_positions=job.model.max_positions,
    )
    watch.on_stage(f"encoding {job.data}")
    run.train_tokens.parent.mkdir(exist_ok=True)
    problems = Problems(job.on_bad_row)
    paths = {"train": run.train_tokens, "heldout": run.heldout_tokens}
    sides = write_texts(
        read_rows(job.data), _encoder(job, run), paths, problems, num_workers=job.num_workers
    )
    _tell(problems, job.data, watch)
    if not all(side.num_bytes for side in sides.values()):
        raise DataError(f"{job.data} has too few rows for train and held-out text. Add more.")
    files = file_hashes(job.data)
    write_json(
        run.corpus,
        {
            "root": job.data,
            "rows": True,
            "files": files,
            "sha256": hashlib.sha256("".join(files.values()).encode()).hexdigest(),
            "left_out": problems.count,
            "left_out_rows": problems.named,
            "vocab_size": load_tokenizer(run.tokenizer).get_vocab_size(),
            "num_tokens": {name: side.num_tokens for name, side in sides.items()},
            "num_bytes": {name: side.num_bytes for name, side in sides.items()},
        },
    )


def encode_heldout(job: Job, run: RunFolder, data: str, path: Path, watch: Watch) -> int:
    """Encode rows that are all scored into one file; returns how many bytes of text they are."""
    sides = {"heldout": path}
    problems = Problems(job.on_bad_row)
    encoder = replace(_encoder(job, run), heldout_fraction=1.0)
    size = write_texts(read_rows(data), encoder, sides, problems, num_workers=job.num_workers)[
        "heldout"
    ].num_bytes
    _tell(problems, data, watch)
    if size == 0:
        raise DataError(f"{data} holds no text to score.")
    return size


def _encoder(job: Job, run: RunFolder) -> TextEncoder:
    tokenizer = load_tokenizer(run.tokenizer)
    (end,) = end_tokens(run.tokenizer)
    return TextEncoder(tokenizer, end, job.text_field, job.corpus.heldout_fraction)


def _tell(problems: Problems, data: str, watch: Watch) -> None:
    if problems.count:
        watch.on_stage(f"{problems.count} rows of {data} were left out, first {problems.named[0]}")


def _train_texts(job: Job, problems: Problems) -> Iterator[str]:
    """Yield each text of the train side; what has no text goes to the problems."""
    for row in read_rows(job.data):
        text = row if isinstance(row, Problem) else text_field(row, job.text_field)
        if isinstance(text, Problem):
            problems.add(text)
        elif side_of(text.encode(), job.corpus.heldout_fraction) == "train":
            yield text
