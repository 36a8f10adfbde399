"""The folder of one run: what lies where in it."""

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.checkpoint.json_file import read_json_object, write_json
from plait.config import from_json, to_json
from plait.errors import CheckpointError, ConfigError
from plait.train.job import Job, settled_dtype
from plait.train.tuning_job import TuningJob


@dataclass(frozen=True)
class RunFolder:
    """Paths below `path`, and the readers and writers of the small files."""

    path: Path

    @property
    def resolved(self) -> Path:
        """The job, every setting spelled out."""
        return self.path / "resolved.json"

    @property
    def corpus(self) -> Path:
        """Names, sizes and hashes of all files of the corpus."""
        return self.path / "corpus.json"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer files."""
        return self.path / "tokenizer"

    @property
    def train_tokens(self) -> Path:
        """The train side, encoded."""
        return self.path / "tokens" / "train.bin"

    @property
    def heldout_tokens(self) -> Path:
        """The held-out side, encoded."""
        return self.path / "tokens" / "heldout.bin"

    @property
    def environment(self) -> Path:
        """Versions and hardware, one JSON object a line for each time the run was started."""
        return self.path / "environment.jsonl"

    @property
    def events(self) -> Path:
        """TensorBoard's files."""
        return self.path / "tensorboard"

    @property
    def best(self) -> Path:
        """Checkpoint with the lowest held-out loss."""
        return self.checkpoints / "best"

    def write_environment(self, facts: dict[str, Any]) -> None:
        """Add what the run is made on."""
        with self.environment.open("a", encoding="utf-8") as file:
            file.write(json.dumps(facts) + "\n")

    @property
    def data(self) -> Path:
        """Names, sizes and hashes of the rows that a fine-tuning run reads."""
        return self.path / "data.json"

    def rows(self, name: str) -> Path:
        """Packed rows of the train set or of an evaluation set."""
        return self.path / "tokens" / f"{name}.rows"

    @property
    def adapter(self) -> Path:
        """The trained adapter in the layout of PEFT."""
        return self.path / "adapter"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: each step and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, `step-NNNNNN`."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The trained model in the layout of Hugging Face."""
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        """Result of the last `plait evaluate`."""
        return self.path / "evaluation.json"

    @property
    def xz(self) -> Path:
        """What xz makes of the held-out text."""
        return self.path / "xz.json"

    @property
    def report(self) -> Path:
        """The page with the loss curve."""
        return self.path / "report.html"

    @property
    def base_model(self) -> Path:
        """Names and hashes of the files of the model that fine-tuning begins with."""
        return self.path / "base_model.json"

    def write_job(self, job: Job | TuningJob) -> None:
        """Start a run of the job, its dtype settled, so that a resume elsewhere keeps it.

        Raises ConfigError if there is something in the folder already.
        """
        if self.resolved.exists():
            raise ConfigError(
                f"{self.path} already holds a run. "
                "Continue it with --resume, or choose another --out."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        if any(self.path.iterdir()):
            raise ConfigError(f"{self.path} is not empty. Choose another --out.")
        dtype = settled_dtype(job.dtype, job.torch_device().type)
        write_json(self.resolved, to_json(replace(job, dtype=dtype)))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from training in this folder; raises ConfigError if one does."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another process is training in {self.path}.") from None
            yield

    def read_job(self) -> Job:
        """Return the job; raises CheckpointError if there is none, ConfigError if malformed."""
        job = self.read_any_job()
        if isinstance(job, TuningJob):
            raise ConfigError(
                f"{self.path} is a run of fine-tuning; this needs one of pre-training, or --data."
            )
        return job

    def read_any_job(self) -> Job | TuningJob:
        """Return the job, of whichever kind."""
        data = self._read_json(self.resolved)
        return from_json(TuningJob if "objective" in data else Job, data)

    def read_corpus(self) -> dict[str, Any]:
        """Return the content of `corpus.json`."""
        return self._read_json(self.corpus)

    def step_folders(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        steps = {
            int(match[1]): path
            for path in self.checkpoints.iterdir()
            if (match := re.fullmatch(r"step-(\d+)", path.name))
        }
        return [steps[step] for step in sorted(steps)]

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records written so far; CheckpointError naming a line that is none.

        A last line that was cut short by a crash is left out.
        """
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines and not lines[-1].endswith("}"):
            del lines[-1]
        return [
            _record(line, f"{self.metrics}:{number}") for number, line in enumerate(lines, start=1)
        ]

    def _read_json(self, path: Path) -> dict[str, Any]:
        if not path.is_file():
            raise CheckpointError(f"{self.path} is not a run folder: it has no {path.name}.")
        return read_json_object(path)


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{place} is no record of a step: {error}.") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise CheckpointError(f"{place} is no record of a step: it has no number of one.")
    return record


def adapter_folder(path: Path) -> Path:
    """Folder of the adapter in a fine-tuning run, or `path` itself if it is no run."""
    run = RunFolder(path)
    if run.resolved.is_file() and not run.adapter.is_dir():
        raise ConfigError(f"{path} is a run without an adapter: not finished, or method=full.")
    return run.adapter if run.adapter.is_dir() else path
