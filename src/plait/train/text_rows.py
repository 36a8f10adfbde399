"""Rows of plain text, encoded for pre-training: one stream of tokens for each side of a split."""

import hashlib
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from plait.train.data import token_dtype
from plait.train.encode_rows import in_order
from plait.train.piece_encoder import PieceEncoder
from plait.train.rows import Problem, Problems, Row, text_field

SIDES = ("train", "heldout")


@dataclass
class Side:
    """Tokens of some texts as they lie on disk; how many they are, and bytes of text."""

    content: bytes = b""
    num_tokens: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class EncodedTexts:
    """What some rows came to; a few long strings of bytes pass between processes cheaply."""

    sides: Mapping[str, Side] = field(default_factory=lambda: {side: Side() for side in SIDES})
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class TextEncoder:
    """Encodes one field of each row; `end_of_text` stands before every text.

    A hash of its text puts a row on one side, so that exact copies stay together.
    """

    tokenizer: Tokenizer
    end_of_text: int
    field: str = "text"
    heldout_fraction: float = 0.0

    def __call__(self, rows: list[Row | Problem]) -> EncodedTexts:
        """Encode some rows at once."""
        found = [row if isinstance(row, Problem) else text_field(row, self.field) for row in rows]
        result = EncodedTexts(problems=[each for each in found if isinstance(each, Problem)])
        texts = [each for each in found if isinstance(each, str)]
        parts: dict[str, list[bytes]] = {side: [] for side in SIDES}
        for text, tokens in zip(texts, self._pieces(texts), strict=True):
            content = text.encode()
            side = side_of(content, self.heldout_fraction)
            parts[side] += (self.end, tokens)
            result.sides[side].num_bytes += len(content)
        for name, side in result.sides.items():
            side.content = b"".join(parts[name])
            side.num_tokens = len(side.content) // len(self.end)
        return result

    @cached_property
    def end(self) -> bytes:
        """`end_of_text` as it lies on disk."""
        dtype = token_dtype(self.tokenizer.get_vocab_size())
        return np.array([self.end_of_text], dtype).tobytes()

    @cached_property
    def _pieces(self) -> PieceEncoder:
        """Made where it is used: each process has its own."""
        return PieceEncoder(self.tokenizer)


def side_of(content: bytes, heldout_fraction: float) -> str:
    """The side of a text in UTF-8."""
    if heldout_fraction == 0:
        return "train"
    first = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    return "heldout" if first < int(heldout_fraction * 2**64) else "train"


def write_texts(
    rows: Iterable[Row | Problem],
    encoder: TextEncoder,
    paths: Mapping[str, Path],
    problems: Problems,
    *,
    num_workers: int = 0,
) -> dict[str, Side]:
    """Encode rows into a file for each side in `paths`, `end_of_text` behind the last; count them.

    The files, which `read_tokens` maps, appear when they are complete; memory does not grow with
    the rows. The result has no content.
    """
    totals = {side: Side() for side in paths}
    temporary = {side: path.with_name(f"{path.name}.incomplete") for side, path in paths.items()}
    with ExitStack() as stack:
        files = {side: stack.enter_context(path.open("wb")) for side, path in temporary.items()}
        for batch in in_order(encoder, rows, num_workers=num_workers):
            for problem in batch.problems:
                problems.add(problem)
            for side, file in files.items():
                file.write(batch.sides[side].content)
                totals[side].num_tokens += batch.sides[side].num_tokens
                totals[side].num_bytes += batch.sides[side].num_bytes
        for side, file in files.items():
            file.write(encoder.end)
            totals[side].num_tokens += 1
            file.flush()
            os.fsync(file.fileno())
    for side, path in paths.items():
        temporary[side].rename(path)
    return totals
