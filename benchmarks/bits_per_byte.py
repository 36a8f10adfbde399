"""Bits per byte of `stdlib_15m` on held-out text after at most 30 minutes, against xz -9e.

Runs `plait train stdlib_15m` and `plait evaluate` as a user would. The clock covers the command:
reading, tokenizer, encoding, training, evaluation and xz.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.result import Row, run_benchmark

PLAIT = [sys.executable, "-m", "plait.cli.main"]


def measure(quick: bool) -> list[Row]:
    """Train in full; nothing of it fits under a minute."""
    values: dict[str, list[float]] = {}
    if not quick:
        with TemporaryDirectory() as folder:
            started_s = time.perf_counter()
            _run("train", "stdlib_15m", "--out", f"{folder}/run")
            minutes = (time.perf_counter() - started_s) / 60
            result = json.loads(_run("evaluate", f"{folder}/run", "--json"))
            steps = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
            train_s = [r["elapsed_s"] for r in map(json.loads, steps) if "elapsed_s" in r][-1]
        xz = result["xz"]
        values = {
            "ratio": [result["bits_per_byte"] / xz["solid"]],
            "train": [train_s / 60],
            "command": [minutes],
            "ours": [result["bits_per_byte"]],
            "solid": [xz["solid"]],
            "each": [xz["per_file"]],
            "after": [xz["conditional"]],
        }
    claims = [
        ("ratio", "held-out bits per byte, ratio to solid xz -9e", "x", 1.0),
        ("train", "time of all training steps", "min", None),
        ("command", "time of the whole command, evaluation and xz included", "min", 30.0),
        ("ours", "held-out bits per byte", "bits/byte", None),
        ("solid", "xz -9e, all held-out files as one", "bits/byte", None),
        ("each", "xz -9e, each held-out file alone", "bits/byte", None),
        ("after", "xz -9e, after the training text", "bits/byte", None),
    ]
    return [
        Row(
            claim=claim,
            unit=unit,
            target=target,
            better="lower",
            samples=values.get(key, []),
            full_only=True,
        )
        for key, claim, unit, target in claims
    ]


def _run(*arguments: str) -> str:
    done = subprocess.run([*PLAIT, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    run_benchmark("bits_per_byte", measure)
