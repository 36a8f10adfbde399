"""Read text files: in pieces of bounded size, checked to be UTF-8, hashed, with their lines."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_READ_BYTES = 1 << 20
_TELLING_LINE_BYTES = 20
"""Shorter lines, such as `return None`, occur in unrelated programs."""


@dataclass(frozen=True)
class Lines:
    """Hashes of the distinct lines of a file, stripped, the `num_short` short ones first."""

    hashes: NDArray[np.uint64]
    num_short: int


@dataclass(frozen=True)
class TextFile:
    """What one pass over a file tells; problem says why it cannot be used, if so."""

    num_bytes: int
    sha256: str
    lines: Lines
    problem: str | None
    is_empty: bool


def read_text_file(path: Path) -> TextFile:
    """Read a file once; stops at the first byte that is not text."""
    total, size, is_empty = hashlib.sha256(), 0, True
    short: set[bytes] = set()
    telling: set[bytes] = set()
    problem = None
    for content in cut_at_line_ends(read_blocks(path, 0, None)):
        if (problem := _why_not_text(content, size)) is not None:
            break
        total.update(content)
        size += len(content)
        for line in {line.strip() for line in content.split(b"\n")} - {b""}:
            is_empty = False
            kind = short if len(line) < _TELLING_LINE_BYTES else telling
            kind.add(hashlib.blake2b(line, digest_size=8).digest())
    hashes = np.frombuffer(b"".join((*short, *telling)), dtype=np.uint64)
    if problem is None and is_empty:
        problem = "empty"
    return TextFile(size, total.hexdigest(), Lines(hashes, len(short)), problem, problem == "empty")


def read_blocks(path: Path, start: int, end: int | None) -> Iterator[bytes]:
    """Yield bytes [start, end) of a file, or all from start, about a megabyte at a time."""
    with path.open("rb") as file:
        file.seek(start)
        left = sys.maxsize if end is None else end - start
        while left > 0 and (block := file.read(min(_READ_BYTES, left))):
            left -= len(block)
            yield block


def cut_at_line_ends(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Regroup blocks to end at line ends, or between characters where a line is too long."""
    rest = b""
    for block in blocks:
        text = rest + block
        cut = text.rfind(b"\n") + 1
        if cut == 0 and len(text) >= _READ_BYTES:
            cut = len(text) - _num_unfinished(text)
        if cut:
            yield text[:cut]
        rest = text[cut:]
    if rest:
        yield rest


def _num_unfinished(text: bytes) -> int:
    """Bytes at the end that begin a UTF-8 character but do not finish it."""
    for back in range(1, 4):
        lead = text[-back]
        if lead & 0xC0 != 0x80:  # not a continuation byte
            size = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            return back if size > back else 0
    return 0


def _why_not_text(content: bytes, offset: int) -> str | None:
    if (at := content.find(b"\0")) >= 0:
        return f"a zero byte at {offset + at}"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"no UTF-8 at byte {offset + error.start}"
    return None
