"""From JSON lines to packed tokens on disk: speed and memory against `datasets`.

The rival's way is that of the standard training scripts: load the file, `map` the tokenizer over
batches, `map` the concatenation into blocks of one length. Both sides write all blocks to disk,
with one process and one thread of the tokenizer, in turn, each run in a process of its own. Time is
taken by the clock, which other work on the machine disturbs, and as processor time, which it hardly
does. Once over the corpus the table of known pieces fills, which is bounded: memory is compared
from two copies on.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.result import ROOT, Row, run_benchmark

SIDES = ("plait", "datasets")
LENGTH = 1024


def measure(quick: bool) -> list[Row]:
    """Run both sides in turn over one file; then ours over files of growing size."""
    rounds, copies = (1, 1) if quick else (3, 1)
    with TemporaryDirectory() as folder:
        _worker("prepare", folder, copies)
        orders = [SIDES if i % 2 == 0 else SIDES[::-1] for i in range(rounds)]
        runs = [{side: _worker(side, folder, copies) for side in order} for order in orders]
        memory = []
        for times in (2, 8):
            _worker("grow", folder, times * copies)
            memory.append(_worker("plait", folder, times * copies)["memory_bytes"])
    for run in runs:
        ours, theirs = (run[side]["tokens"] for side in SIDES)
        if abs(ours - theirs) > 0.01 * ours:  # theirs drops what is left of each batch
            raise RuntimeError(f"the sides do not read the same: {ours} and {theirs} tokens")
    return [
        Row(
            claim="tokens/s on one core, encoded and packed, ratio to datasets",
            unit="x",
            target=1.5,
            better="higher",
            samples=[_speed(run["plait"]) / _speed(run["datasets"]) for run in runs],
        ),
        Row(
            claim="tokens per second of processor time, ratio to datasets",
            unit="x",
            target=1.5,
            better="higher",
            samples=[
                (run["plait"]["tokens"] / run["plait"]["core_seconds"])
                / (run["datasets"]["tokens"] / run["datasets"]["core_seconds"])
                for run in runs
            ],
        ),
        Row(
            claim="memory above the imports, eight times the corpus, ratio to twice",
            unit="x",
            target=1.1,
            better="lower",
            samples=[memory[1] / memory[0]],
        ),
        *(
            Row(
                claim=f"{name} of {side}",
                unit=unit,
                target=None,
                better=better,
                samples=[value(run[side]) for run in runs],
            )
            for name, unit, better, value in (
                ("speed", "tokens/s", "higher", _speed),
                ("memory above the imports", "MB", "lower", lambda run: run["memory_bytes"] / 1e6),
            )
            for side in SIDES
        ),
    ]


def _speed(run: dict[str, float]) -> float:
    return run["tokens"] / run["seconds"]


def _worker(side: str, folder: str, copies: int) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.data_loading",
        "--worker",
        side,
        folder,
        str(copies),
    ]
    environment = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
    environment |= {"PATH": "/usr/bin:/bin", "HOME": folder}
    environment |= {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _work(side: str, folder: Path, copies: int) -> dict[str, float]:
    if side in ("prepare", "grow"):
        return _prepare(folder, copies, with_tokenizer=side == "prepare")
    return (_run_plait if side == "plait" else _run_datasets)(folder)


def _prepare(folder: Path, copies: int, *, with_tokenizer: bool) -> dict[str, float]:
    """Write the standard library's source as rows, some times over, and a tokenizer of it."""
    from plait.train.corpus import STDLIB, CorpusSettings, find_corpus
    from plait.train.tokenizer import save_tokenizer, train_tokenizer

    documents = find_corpus(STDLIB, CorpusSettings(), split=False).heldout
    if with_tokenizer:
        save_tokenizer(
            train_tokenizer(documents, vocab_size=16_384),
            folder / "tokenizer",
            max_positions=LENGTH,
        )
    with (folder / "rows.jsonl").open("w") as file:
        for _ in range(copies):
            for document in documents:
                # Functions and paragraphs rather than whole modules: rows of a few hundred tokens.
                for chunk in document.read_chunks():
                    for start in range(0, len(chunk), 1500):
                        file.write(json.dumps({"text": chunk[start : start + 1500]}) + "\n")
    return {}


def _measured(folder: Path, run) -> dict[str, float]:
    import psutil

    before = psutil.Process().memory_info().rss
    started_s, started_core_s = time.perf_counter(), time.process_time()
    tokens = run()
    seconds, core_seconds = time.perf_counter() - started_s, time.process_time() - started_core_s
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens": tokens,
        "seconds": seconds,
        "core_seconds": core_seconds,
        "memory_bytes": peak - before,
    }


def _run_plait(folder: Path) -> dict[str, float]:
    from plait.checkpoint.huggingface import load_tokenizer
    from plait.train.data import PackedSamples, read_tokens
    from plait.train.rows import Problems, read_rows
    from plait.train.text_rows import TextEncoder, write_texts

    def run() -> int:
        tokenizer, path = load_tokenizer(folder / "tokenizer"), folder / "train.bin"
        encoder = TextEncoder(tokenizer, tokenizer.token_to_id("<|endoftext|>"))
        write_texts(read_rows(folder / "rows.jsonl"), encoder, {"train": path}, Problems())
        tokens = read_tokens(path, vocab_size=tokenizer.get_vocab_size())
        samples = PackedSamples(tokens, sequence_length=LENGTH, seed=0)
        return samples.num_samples * LENGTH

    return _measured(folder, run)


def _run_datasets(folder: Path) -> dict[str, float]:
    from itertools import chain

    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()

    def run() -> int:
        import shutil

        shutil.rmtree(folder / "cache", ignore_errors=True)  # nothing may come from an earlier run
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

        def encode(batch):
            return tokenizer(
                [text + tokenizer.eos_token for text in batch["text"]], add_special_tokens=False
            )

        def group(batch):
            joined = {key: list(chain(*batch[key])) for key in batch}
            total = len(joined["input_ids"]) // LENGTH * LENGTH
            return {
                key: [values[i : i + LENGTH] for i in range(0, total, LENGTH)]
                for key, values in joined.items()
            }

        rows = datasets.load_dataset(
            "json", data_files=str(folder / "rows.jsonl"), cache_dir=str(folder / "cache")
        )["train"]
        encoded = rows.map(encode, batched=True, remove_columns=["text"])
        return len(encoded.map(group, batched=True)) * LENGTH

    return _measured(folder, run)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        _, side, folder, copies = sys.argv[1:]
        print(json.dumps(_work(side, Path(folder), int(copies))))
    else:
        run_benchmark("data_loading", measure)
