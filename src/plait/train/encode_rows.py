"""Rows to tokens, in this process or in others, in order and with a bounded number in flight."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from plait.config import encode_on_one_thread
from plait.errors import DataError
from plait.train.rows import Problem, Problems, Row

_ROWS_AT_ONCE = 256
_IN_FLIGHT = 3
"""Batches that wait or run for each worker: enough to keep it busy, few enough to stay small."""

Result = TypeVar("Result")
Work = Callable[[list[Row | Problem]], Result]


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
    for result in in_order(_PassProblems(encoder), rows, num_workers=num_workers):
        for item in result:
            if isinstance(item, Problem):
                problems.add(item)
            else:
                yield item


def in_order(
    work: Work[Result], rows: Iterable[Row | Problem], *, num_workers: int
) -> Iterator[Result]:
    """Yield what `work` makes of some rows at a time, in order; without workers it runs here."""
    batches = _batches(rows)
    return _in_processes(batches, work, num_workers) if num_workers else map(work, batches)


@dataclass(frozen=True)
class _PassProblems:
    """Lets an encoder pass problems through."""

    encoder: Encoder

    def __call__(self, batch: list[Row | Problem]) -> list[Sample | Problem]:
        good = [row for row in batch if isinstance(row, Row)]
        found = self.encoder(good) if good else []
        return [*(row for row in batch if isinstance(row, Problem)), *found]


def _batches(rows: Iterable[Row | Problem]) -> Iterator[list[Row | Problem]]:
    rows = iter(rows)
    while batch := list(islice(rows, _ROWS_AT_ONCE)):
        yield batch


_WORK: ContextVar[Work[Any]] = ContextVar("work")
"""Of a worker process: a tokenizer is megabytes, so it is sent once and not with every batch."""


def _start_worker(work: Work[Any]) -> None:
    encode_on_one_thread()
    _WORK.set(work)


def _run_in_worker(batch: list[Row | Problem]) -> Any:
    return _WORK.get()(batch)


def _in_processes(
    batches: Iterator[list[Row | Problem]], work: Work[Result], num_workers: int
) -> Iterator[Result]:
    # Spawned, not forked: the tokenizer's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            num_workers, mp_context=context, initializer=_start_worker, initargs=(work,)
        ) as pool:
            waiting: deque[Future[Result]] = deque()
            for batch in batches:
                waiting.append(pool.submit(_run_in_worker, batch))
                if len(waiting) >= num_workers * _IN_FLIGHT:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that encodes rows has died, for want of memory perhaps. Try fewer with "
            f"--set num_workers, now {num_workers}."
        ) from error
