"""Pre-training on rows of text: the same files on disk as `prepare.py` makes of plain text files.

Rows are read twice, to learn a vocabulary and to encode, and never held: memory does not grow with
them. A hash of its text puts a row on one side, so that exact copies stay together.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from plait.checkpoint.huggingface import end_tokens, load_tokenizer
from plait.checkpoint.json_file import write_json
from plait.errors import DataError
from plait.train.data import token_dtype
from plait.train.job import Job
from plait.train.row_files import file_hashes
from plait.train.rows import SUFFIXES, Problem, Problems, is_row_data, read_rows, text_field
from plait.train.run_folder import RunFolder
from plait.train.tokenizer import save_tokenizer, train_tokenizer_on
from plait.train.watch import Watch

_TEXTS_AT_ONCE = 256


def holds_rows(data: str) -> bool:
    """Say whether data are rows: a file or a saved dataset, or a folder of nothing else."""
    path = Path(data)
    if not path.is_dir() or (path / "state.json").is_file():
        return is_row_data(data)
    files = [file for file in path.rglob("*") if file.is_file()]
    return bool(files) and all(file.suffix in SUFFIXES for file in files)


def prepare_rows(job: Job, run: RunFolder, watch: Watch) -> None:
    """Write tokenizer, tokens and `corpus.json`. Raises DataError for a row that has no text."""
    watch.on_stage(f"learning a vocabulary of {job.model.vocab_size:,} tokens")
    texts = (text for is_heldout, text in _texts(job, Problems(job.on_bad_row)) if not is_heldout)
    save_tokenizer(
        train_tokenizer_on(texts, vocab_size=job.model.vocab_size),
        run.tokenizer,
        max_positions=job.model.max_positions,
    )
    watch.on_stage(f"encoding {job.data}")
    run.train_tokens.parent.mkdir(exist_ok=True)
    problems = Problems(job.on_bad_row)
    counts, sizes = _encode(job, run, problems)
    if problems.count:
        watch.on_stage(f"{problems.count} rows were left out, first {problems.named[0]}")
    if not all(sizes.values()):
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
            "num_tokens": counts,
            "num_bytes": sizes,
        },
    )


def _encode(job: Job, run: RunFolder, problems: Problems) -> tuple[dict[str, int], dict[str, int]]:
    """Write both token files at once; count tokens and bytes of each side."""
    tokenizer = load_tokenizer(run.tokenizer)
    tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> does not end there
    (end,) = end_tokens(run.tokenizer)
    dtype = token_dtype(tokenizer.get_vocab_size())
    end_bytes = np.array([end], dtype).tobytes()
    paths = {"train": run.train_tokens, "heldout": run.heldout_tokens}
    counts, sizes = dict.fromkeys(paths, 0), dict.fromkeys(paths, 0)
    temporary = {side: path.with_name(f"{path.name}.incomplete") for side, path in paths.items()}
    with ExitStack() as stack:
        files = {side: stack.enter_context(path.open("wb")) for side, path in temporary.items()}

        def write(batch: list[tuple[bool, str]]) -> None:
            encodings = tokenizer.encode_batch_fast(
                [text for _, text in batch], add_special_tokens=False
            )
            for (is_heldout, text), encoding in zip(batch, encodings, strict=True):
                side = "heldout" if is_heldout else "train"
                files[side].write(end_bytes + np.array(encoding.ids, dtype).tobytes())
                counts[side] += 1 + len(encoding.ids)
                sizes[side] += len(text.encode())

        batch: list[tuple[bool, str]] = []
        for pair in _texts(job, problems):
            batch.append(pair)
            if len(batch) == _TEXTS_AT_ONCE:
                write(batch)
                batch = []
        write(batch)
        for side, file in files.items():
            file.write(end_bytes)
            counts[side] += 1
            file.flush()
            os.fsync(file.fileno())
    for side, path in paths.items():
        temporary[side].rename(path)
    return counts, sizes


def _texts(job: Job, problems: Problems) -> Iterator[tuple[bool, str]]:
    """Yield each text with whether it is held out; what has no text goes to the problems."""
    limit = int(job.corpus.heldout_fraction * 2**64)
    for row in read_rows(job.data):
        text = row if isinstance(row, Problem) else text_field(row, job.text_field)
        if isinstance(text, Problem):
            problems.add(text)
        else:
            digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
            yield int.from_bytes(digest[:8], "big") < limit, text
