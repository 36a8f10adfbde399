"""From documents to batches: tokens on disk, samples of one length, an order that is a function.

Sample number g of a run depends on (seed, g) alone: not on the batch size, the number of ranks or
what was read before.
"""

# Shapes: B samples, T tokens of a sample.

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from plait.errors import DataError
from plait.train.corpus import Document

_CHUNKS_AT_ONCE = 32


def write_tokens(
    documents: Sequence[Document], tokenizer: Tokenizer, path: Path, *, end_of_text: int
) -> int:
    """Encode documents into one file, `end_of_text` before each and behind the last; count tokens.

    Little-endian uint16 if the vocabulary allows it, else uint32. The file appears when it is
    complete.
    """
    tokenizer.encode_special_tokens = True  # a text that spells <|endoftext|> does not end there
    dtype = token_dtype(tokenizer.get_vocab_size())
    temporary = path.with_name(f"{path.name}.incomplete")
    num_tokens = 0
    with temporary.open("wb") as file:
        for document in documents:
            num_tokens += file.write(np.array([end_of_text], dtype).tobytes()) // dtype.itemsize
            chunks = document.read_chunks()
            while batch := list(islice(chunks, _CHUNKS_AT_ONCE)):
                for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    num_tokens += (
                        file.write(np.array(encoding.ids, dtype).tobytes()) // dtype.itemsize
                    )
        num_tokens += file.write(np.array([end_of_text], dtype).tobytes()) // dtype.itemsize
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return num_tokens


def read_tokens(path: Path, *, vocab_size: int) -> NDArray[np.integer]:
    """Map a file of `write_tokens` into memory; `vocab_size` is its tokenizer's."""
    return np.memmap(path, dtype=token_dtype(vocab_size), mode="r")


class PackedSamples:
    """A token stream cut into samples of T inputs and targets, shuffled, epoch after epoch."""

    def __init__(self, tokens: NDArray[np.integer], *, sequence_length: int, seed: int) -> None:
        """Cut `tokens`; raises DataError if they do not fill one sample."""
        self.tokens = tokens
        self._length = sequence_length
        self._seed = seed
        self.num_samples = (len(tokens) - 1) // sequence_length
        if self.num_samples < 1:
            raise DataError(
                f"{len(tokens)} tokens do not fill one sample of {sequence_length}. "
                "Add text, or choose a smaller sequence_length."
            )

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Inputs and targets of samples by global index, each int64 (B, T)."""
        starts = [self._start(index) for index in indices]
        rows = np.stack([self.tokens[s : s + self._length + 1] for s in starts]).astype(np.int64)
        tokens_BU = torch.from_numpy(rows)  # U = T + 1
        return tokens_BU[:, :-1].contiguous(), tokens_BU[:, 1:].contiguous()

    def _start(self, index: int) -> int:
        epoch, place = divmod(index, self.num_samples)
        return shuffled(place, self.num_samples, seed=self._seed, epoch=epoch) * self._length


def shuffled(place: int, size: int, *, seed: int, epoch: int) -> int:
    """Return where `place` goes in a permutation of range(size) fixed by seed and epoch.

    A four-round Feistel network on the next even number of bits, walked until it lands inside
    [Black & Rogaway 2002, "Ciphers with arbitrary finite domains", sections 4 and 5]: no table, any
    order of access.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = place >> half_bits, place & mask
        for round_number in range(4):
            left, right = right, left ^ (_mix(right, round_number, seed, epoch) & mask)
        place = left << half_bits | right
        if place < size:
            return place


def windows(num_tokens: int, *, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut a stream for evaluation: (start, first_scored, end), each target scored once.

    A window feeds tokens [start, end) and scores the targets of [first_scored, end); behind the
    first window each target is scored with at least context - stride tokens before it.
    """
    num_targets = num_tokens - 1
    start, scored = 0, 0
    while scored < num_targets:
        end = min(start + context, num_targets)
        yield start, scored, end
        start, scored = start + stride, end


def _mix(value: int, round_number: int, seed: int, epoch: int) -> int:
    """SplitMix64's finalizer over all arguments [Steele et al. 2014, figure 16]."""
    for word in (round_number, seed, epoch):
        value = (value + (word + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """Type of a token on disk."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
