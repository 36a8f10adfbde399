"""Rows to tokens, in this process or in others, in order and with a bounded number in flight."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from plait.train.rows import Problem, Problems, Row

_ROWS_AT_ONCE = 256
_IN_FLIGHT = 3
"""Batches that wait or run for each worker: enough to keep it busy, few enough to stay small."""


@dataclass(frozen=True)
class Sample:
    """Tokens uint32 (T,) of one document, and which of them are learnt, bool (T,)."""

    place: str
    tokens: NDArray[np.uint32]
    counted: NDArray[np.bool_]


class Encoder(Protocol):
    """Makes samples of rows; an object that can be sent to another process."""

    def __call__(self, rows: list[Row]) -> list[Sample | Problem]:
        """Encode some rows at once: as many samples or problems as the rows make."""
        ...


def encode_rows(
    rows: Iterable[Row | Problem], encoder: Encoder, problems: Problems, *, num_workers: int = 0
) -> Iterator[Sample]:
    """Yield the samples of all rows, in order; without workers this process encodes."""
    batches = _batches(rows)
    results = map(encoder_of(encoder), batches) if num_workers == 0 else None
    if results is None:
        results = _in_processes(batches, encoder, num_workers)
    for result in results:
        for item in result:
            if isinstance(item, Problem):
                problems.add(item)
            else:
                yield item


def encoder_of(encoder: Encoder) -> Callable[[list[Row | Problem]], list[Sample | Problem]]:
    """Let an encoder pass problems through, at their places between the rows."""
    return _PassProblems(encoder)


@dataclass(frozen=True)
class _PassProblems:
    encoder: Encoder

    def __call__(self, batch: list[Row | Problem]) -> list[Sample | Problem]:
        good = [row for row in batch if isinstance(row, Row)]
        found = self.encoder(good) if good else []
        return [*(row for row in batch if isinstance(row, Problem)), *found]


def _batches(rows: Iterable[Row | Problem]) -> Iterator[list[Row | Problem]]:
    rows = iter(rows)
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        yield batch


def _in_processes(
    batches: Iterator[list[Row | Problem]], encoder: Encoder, num_workers: int
) -> Iterator[list[Sample | Problem]]:
    # Spawned, not forked: the tokenizer's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        waiting: deque[Future[list[Sample | Problem]]] = deque()
        for batch in batches:
            waiting.append(pool.submit(encoder_of(encoder), batch))
            if len(waiting) >= num_workers * _IN_FLIGHT:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
