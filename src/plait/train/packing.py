"""Samples side by side in rows of one length; tokens of one do not see those of another.

The rows lie on disk in one file, so that memory stays flat and a resumed run finds the same ones.
"""

# Shapes: B rows, T tokens of a row, U = T + 1.

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plait.errors import DataError
from plait.nn.token_layout import TokenLayout
from plait.train.encode_rows import Sample

_OPEN_ROWS = 64
"""Rows that still take samples. More leave less padding and more samples out of order."""


@dataclass(frozen=True)
class Batch:
    """inputs and targets int64 (B, T); targets of what is not learnt are -100.

    layout: None where every row holds one document.
    """

    inputs: Tensor
    targets: Tensor
    layout: TokenLayout | None

    @property
    def num_targets(self) -> int:
        """How many tokens are learnt."""
        return int((self.targets >= 0).sum())

    def to(self, device: torch.device) -> "Batch":
        """Copy to a device."""
        layout = self.layout
        if layout is not None:
            assert layout.positions is not None, "made with positions and segments"
            assert layout.segments is not None, "made with positions and segments"
            layout = TokenLayout(
                positions=layout.positions.to(device), segments=layout.segments.to(device)
            )
        return Batch(self.inputs.to(device), self.targets.to(device), layout)


@dataclass(frozen=True)
class PackedFacts:
    """What was written: rows, samples in them, their tokens, and how many of these are learnt."""

    num_rows: int
    num_samples: int
    num_tokens: int
    num_counted: int


def row_dtype(sequence_length: int) -> np.dtype[np.void]:
    """Layout of a row on disk: tokens, the number of their sample (0 = padding), learnt or not."""
    size = sequence_length + 1
    return np.dtype(
        [("tokens", "<u4", (size,)), ("segments", "<u2", (size,)), ("counted", "?", (size,))]
    )


def write_packed(
    samples: Iterable[Sample],
    path: Path,
    *,
    sequence_length: int,
    pack: bool,
    pad: int = 0,
    source: str = "the rows",
) -> PackedFacts:
    """Put samples into rows of `sequence_length` + 1 tokens, each into the fullest that has room.

    Without `pack` every sample has a row of its own. The file appears when it is complete. Raises
    DataError for a sample longer than a row, or, naming `source`, for none at all.
    """
    temporary = path.with_name(f"{path.name}.incomplete")
    num_samples = num_tokens = num_counted = 0
    with temporary.open("wb") as file:
        rows = _OpenRows(sequence_length, pad)
        for sample in samples:
            if len(sample.tokens) > sequence_length + 1:
                raise DataError(
                    f"{sample.place}: {len(sample.tokens)} tokens do not fit into a row of "
                    f"{sequence_length + 1}."
                )
            num_samples += 1
            num_tokens += len(sample.tokens)
            num_counted += int(sample.counted[1:].sum())
            for row in rows.add(sample, most_open=_OPEN_ROWS if pack else 0):
                file.write(row.tobytes())
        for row in rows.rest():
            file.write(row.tobytes())
        file.flush()
        os.fsync(file.fileno())
    if num_samples == 0:
        raise DataError(f"no sample is left of {source}. Give rows that can be used.")
    temporary.rename(path)
    return PackedFacts(rows.num_rows, num_samples, num_tokens, num_counted)


class _OpenRows:
    """Rows that are not full yet, by the room they have."""

    def __init__(self, sequence_length: int, pad: int) -> None:
        self.num_rows = 0
        self._size = sequence_length + 1
        self._dtype = row_dtype(sequence_length)
        self._pad = pad
        self._open: list[tuple[int, np.ndarray]] = []  # tokens in use, row

    def add(self, sample: Sample, *, most_open: int) -> list[np.ndarray]:
        """Place a sample; returns rows that are closed by it."""
        size = len(sample.tokens)
        used, row = self._take(size)
        part = slice(used, used + size)
        row["tokens"][part] = sample.tokens
        row["segments"][part] = row["segments"].max() + 1
        row["counted"][part] = sample.counted
        row["counted"][used] = False  # what comes first follows nothing of its own document
        self._open.append((used + size, row))
        closed = [pair for pair in self._open if pair[0] == self._size]
        while len(self._open) - len(closed) > most_open:
            fullest = max(
                (pair for pair in self._open if not any(pair is c for c in closed)),
                key=lambda pair: pair[0],
            )
            closed.append(fullest)
        self._open = [pair for pair in self._open if not any(pair is c for c in closed)]
        return [row for _, row in closed]

    def rest(self) -> list[np.ndarray]:
        """Close what is still open."""
        return [row for _, row in self._open]

    def _take(self, size: int) -> tuple[int, np.ndarray]:
        fitting = [i for i, (used, _) in enumerate(self._open) if used + size <= self._size]
        if fitting:
            return self._open.pop(max(fitting, key=lambda i: self._open[i][0]))
        self.num_rows += 1
        row = np.zeros((), self._dtype)
        row["tokens"] = self._pad
        return 0, row


class PackedRows:
    """Rows of `write_packed`, mapped into memory."""

    def __init__(self, path: Path, *, sequence_length: int) -> None:
        """Open a file."""
        self._rows = np.memmap(path, dtype=row_dtype(sequence_length), mode="r")

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, numbers: Sequence[int]) -> Batch:
        """Make the batch of some rows, cut behind the last token of the longest."""
        rows = self._rows[list(numbers)]
        used = int((rows["segments"] > 0).sum(axis=1).max())
        tokens = torch.from_numpy(rows["tokens"][:, :used].astype(np.int64))
        segments = torch.from_numpy(rows["segments"][:, :used].astype(np.int64))
        counted = torch.from_numpy(rows["counted"][:, :used].copy())
        is_learnt = counted[:, 1:] & (segments[:, 1:] == segments[:, :-1])
        targets = tokens[:, 1:].masked_fill(~is_learnt, -100)
        layout = None
        if segments.max() > 1:
            layout = TokenLayout(
                positions=positions_of(segments[:, :-1]), segments=segments[:, :-1].contiguous()
            )
        return Batch(tokens[:, :-1].contiguous(), targets.contiguous(), layout)


def layout_of_stream(tokens_BT: Tensor, *, end_of_text: int) -> TokenLayout:
    """Cut rows of a token stream into documents; `end_of_text` stands before each."""
    segments_BT = (tokens_BT == end_of_text).cumsum(dim=1)
    return TokenLayout(positions=positions_of(segments_BT), segments=segments_BT)


def positions_of(segments_BT: Tensor) -> Tensor:
    """Count tokens from the start of their document, int64 (B, T)."""
    places_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    starts_BT = torch.zeros_like(segments_BT)
    is_start_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts_BT[:, 1:] = torch.where(is_start_BT, places_T[1:], 0)
    return places_T - starts_BT.cummax(dim=1).values
