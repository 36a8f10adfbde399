"""What a run came to, in one line, and how runs differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from plait.train.run_folder import RunFolder


@dataclass(frozen=True)
class RunSummary:
    """loss: of the last step [nats]. Held-out figures are the best; None where there is none.

    tokens_per_s: median over the steps.
    """

    recipe: str
    step: int
    finished: bool
    loss: float | None
    best_heldout_loss: float | None
    best_bits_per_byte: float | None
    tokens_per_s: float | None
    elapsed_s: float


def summarize(run: RunFolder) -> RunSummary:
    """Read a run's metrics. Raises CheckpointError if the folder holds no run."""
    job = run.read_any_job()
    records = run.read_metrics()
    steps = [record for record in records if "loss" in record]
    return RunSummary(
        recipe=job.name,
        step=steps[-1]["step"] if steps else 0,
        finished=run.model.is_dir(),
        loss=steps[-1]["loss"] if steps else None,
        best_heldout_loss=_least(records, "heldout_loss"),
        best_bits_per_byte=_least(records, "heldout_bits_per_byte"),
        tokens_per_s=median(r["tokens_per_s"] for r in steps) if steps else None,
        elapsed_s=steps[-1]["elapsed_s"] if steps else 0.0,
    )


def differing_settings(jobs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings that are not the same in all jobs: by path, then by run; None where one has none."""
    flat = {name: _flatten(job) for name, job in jobs.items()}
    paths = dict.fromkeys(path for settings in flat.values() for path in settings)
    found = {path: {name: flat[name].get(path) for name in flat} for path in paths}
    return {
        path: values
        for path, values in found.items()
        if any(value != next(iter(values.values())) for value in values.values())
    }


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    return {
        inner: leaf
        for name, entry in value.items()
        for inner, leaf in _flatten(entry, f"{path}.{name}" if path else name).items()
    }


def _least(records: list[dict[str, Any]], key: str) -> float | None:
    return min((record[key] for record in records if key in record), default=None)
