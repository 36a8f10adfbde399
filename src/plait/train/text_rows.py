"""Rows of plain text, encoded for pre-training."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from plait.train.encode_rows import Sample
from plait.train.rows import Problem, Row, text_field


@dataclass(frozen=True)
class TextEncoder:
    """Encodes one field of each row; `end_of_text` stands behind every document."""

    tokenizer: Tokenizer
    end_of_text: int
    field: str = "text"

    def __call__(self, rows: list[Row]) -> list[Sample | Problem]:
        """Encode some rows at once."""
        texts = [text_field(row, self.field) for row in rows]
        encodings = iter(
            self.tokenizer.encode_batch_fast(
                [text for text in texts if isinstance(text, str)], add_special_tokens=False
            )
        )
        return [
            text if isinstance(text, Problem) else self._sample(row, next(encodings).ids)
            for row, text in zip(rows, texts, strict=True)
        ]

    def _sample(self, row: Row, tokens: list[int]) -> Sample:
        ids = np.empty(len(tokens) + 1, np.uint32)
        ids[:-1], ids[-1] = tokens, self.end_of_text
        return Sample(row.place, ids, np.ones(len(ids), np.bool_))


def write_blocks(samples: Iterable[Sample], path: Path, *, length: int) -> int:
    """Join all samples and cut them into blocks of `length` tokens, uint32; returns how many.

    What does not fill the last block is left out. The file appears when it is complete.
    """
    temporary = path.with_name(f"{path.name}.incomplete")
    num_tokens = 0
    with temporary.open("wb") as file:
        for sample in samples:
            num_tokens += file.write(sample.tokens.astype("<u4").tobytes()) // 4
        num_blocks = num_tokens // length
        file.truncate(num_blocks * length * 4)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return num_blocks
