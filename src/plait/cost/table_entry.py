"""One measured operator of a table of times."""

from dataclasses import dataclass
from typing import cast

import torch

from plait.cost.operations import Cost, Kind
from plait.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One operator on one form: median seconds of its runs and their 10th and 90th percentile."""

    key: str
    operator: str
    seconds: float
    low_s: float
    high_s: float
    flops: int
    bytes: int
    dtype: str
    sizes: tuple[int, ...] = ()
    pieces: int = 0


def cost_of_entry(entry: Entry) -> Cost:
    """What the operator of an entry does."""
    kind = Kind.MATRIX if entry.sizes else Kind.ATTENTION if entry.flops else Kind.MEMORY
    return Cost(
        kind=kind,
        bytes=entry.bytes,
        flops=entry.flops,
        dtype=dtype_named(entry.dtype),
        sizes=cast("tuple[int, int, int]", entry.sizes) if entry.sizes else None,
        pieces=entry.pieces,
    )


def dtype_named(name: str) -> torch.dtype:
    """A dtype from its text. Raises PlanError for anything else."""
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise PlanError(f"{name!r} is no dtype of torch.")
    return found
