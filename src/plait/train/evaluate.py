"""Score held-out text: perplexity per token and bits per byte, every token exactly once."""

# Shapes: B windows, T tokens, D model width.

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from plait.errors import ConfigError
from plait.models.decoder import Decoder
from plait.train.data import windows
from plait.train.job import TORCH_DTYPES, Dtype, settled_dtype
from plait.train.packing import layout_of_stream
from plait.train.step import autocast

_WINDOWS_AT_ONCE = 8
_Window = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How a text is read: windows of `context` tokens advance by `stride`, products in `dtype`.

    Every token is scored once, behind the first window with at least context - stride tokens before
    it.
    """

    context: int
    stride: int
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.stride <= self.context:
            raise ConfigError(f"stride={self.stride} must lie in 1..context={self.context}.")


@dataclass(frozen=True)
class Evaluation:
    """Sum of -log p over `num_tokens` tokens [nats], which stand for `num_bytes` bytes of text."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """Of one token; depends on the tokenizer."""
        return math.exp(self.nats / self.num_tokens)

    @property
    def bits_per_byte(self) -> float:
        """Of the text, document ends paid for; comparable between tokenizers and with xz."""
        return self.nats / math.log(2) / self.num_bytes


@torch.no_grad()
def evaluate(
    model: Decoder,
    tokens: NDArray[np.integer],
    *,
    num_bytes: int,
    scoring: Scoring,
    most_windows: int | None = None,
    end_of_text: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score all of `tokens` but the first, which stand for `num_bytes` bytes of text.

    With `most_windows`, only so many, evenly spread; the bytes are then counted in proportion.
    With `end_of_text`, the token before each document, tokens see those of their own document only.
    `on_progress(done, total)` counts scored tokens.
    """
    device_type = model.embed_tokens.weight.device.type
    dtype = TORCH_DTYPES[settled_dtype(scoring.dtype, device_type)]
    was_training = model.training
    model.eval()
    nats, done = 0.0, 0
    chosen = list(windows(len(tokens), context=scoring.context, stride=scoring.stride))
    if most_windows is not None and most_windows < len(chosen):
        chosen = [chosen[i * len(chosen) // most_windows] for i in range(most_windows)]
    total = sum(end - first for _, first, end in chosen)
    for batch in _batches(chosen):
        (start, first, end) = batch[0]
        rows = np.stack([tokens[s : e + 1] for s, _, e in batch]).astype(np.int64)
        tokens_BU = torch.from_numpy(rows).to(model.embed_tokens.weight.device)  # U = T + 1
        layout = None
        if end_of_text is not None:
            layout = layout_of_stream(tokens_BU[:, :-1], end_of_text=end_of_text)
        with autocast(device_type, dtype):
            hidden_BTD = model(tokens_BU[:, :-1], layout)
        scored_BTD, targets_BT = hidden_BTD[:, first - start :], tokens_BU[:, 1 + first - start :]
        nats += model.loss(scored_BTD, targets_BT, dtype=dtype).item()
        done += len(batch) * (end - first)
        on_progress(done, total)
    model.train(was_training)
    share = total / (len(tokens) - 1)
    return Evaluation(nats, total, round(num_bytes * share))


def _batches(all_windows: Sequence[_Window]) -> Iterator[list[_Window]]:
    """Put windows of equal length and overlap together."""
    for _, alike in groupby(all_windows, key=lambda w: (w[2] - w[0], w[1] - w[0])):
        group = list(alike)
        for i in range(0, len(group), _WINDOWS_AT_ONCE):
            yield group[i : i + _WINDOWS_AT_ONCE]
