"""Whose memory it is: the tensors of a rank by what made them, with the user's line.

A layer's tensors are known by their names in one layer; what a rank holds of each is the sum over
its layers and over the micro-batches in flight.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from plait.dryrun.piece import Piece
from plait.dryrun.saved import Tensor

_LAYER = re.compile(r"(\.)\d+(\.)")
_SAVED = "saved activations"


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Bytes that a rank holds for one parameter or one saved value of its layers.

    kind: as in the ledger; name: of the value, "*" for the layer; source: the user's line.
    """

    num_bytes: float
    kind: str
    name: str
    source: str = ""

    def __str__(self) -> str:
        """In a line."""
        where = f"  {self.source}" if self.source else ""
        return f"{self.num_bytes / 2**30:.1f} GiB  {self.kind}  {self.name}{where}"


def owners_of_rank(
    pieces: Iterable[tuple[Piece, int]],
    *,
    state_bytes: float,
    saved_bytes: float,
    top: int,
) -> tuple[Owner, ...]:
    """The largest owners of a rank with these pieces, its state and its saved activations."""
    held = list(pieces)
    saved = _grouped((each, count) for piece, count in held for each in piece.saved_tensors)
    states = _grouped((each, count) for piece, count in held for each in piece.parameters)
    found = [
        *_shared(saved, sum(saved.values()), saved_bytes, _SAVED),
        *_shared(states, sum(states.values()), state_bytes, "parameters and their state"),
    ]
    return tuple(sorted(found, key=lambda each: -each.num_bytes)[:top])


def _grouped(tensors: Iterable[tuple[Tensor, int]]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for each, count in tensors:
        key = _LAYER.sub(r"\1*\2", each.name), each.source
        found[key] = found.get(key, 0.0) + count * each.num_bytes
    return found


def _shared(
    sizes: dict[tuple[str, str], float], total: float, num_bytes: float, kind: str
) -> Sequence[Owner]:
    if not total:
        return ()
    return [
        Owner(num_bytes=num_bytes * size / total, kind=kind, name=name, source=source)
        for (name, source), size in sizes.items()
    ]
