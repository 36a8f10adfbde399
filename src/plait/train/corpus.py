"""The text of a run: which files, split into train and held-out, with a hash of every byte.

The split is by file and depends on names and contents alone. Files that share over half of their
lines stay together (`_group`), so that the held-out side is not a copy of the train side.
"""

import hashlib
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from plait.errors import ConfigError, DataError

STDLIB = "stdlib"
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "node_modules"})
_READ_BYTES = 1 << 20
_COMMON_LINE_FILES = 1000
"""A line in more files than this says nothing about copies; leaving it out bounds the work."""
_TELLING_LINE_BYTES = 20
"""Shorter lines, such as `return None`, occur in unrelated programs."""


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """How files become a corpus.

    suffixes: of the files to take, such as ".py"; empty = all. undecodable: what to do with files
    that are not UTF-8 text; the few in the standard library are test data and always left out.
    """

    heldout_fraction: float = 0.06
    suffixes: tuple[str, ...] = ()
    undecodable: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        """Check the fraction."""
        if not 0 < self.heldout_fraction < 1:
            raise ConfigError(
                f"corpus.heldout_fraction={self.heldout_fraction} is not between 0 and 1."
            )


@dataclass(frozen=True)
class Document:
    """Bytes [start, end) of a file; name is its path below the corpus root."""

    name: str
    path: Path
    start: int
    end: int
    sha256: str

    def read_chunks(self) -> Iterator[str]:
        """Yield the text in pieces of about a megabyte, cut at line ends: memory stays flat."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left, rest = self.end - self.start, b""
            while left > 0:
                block = file.read(min(_READ_BYTES, left))
                if not block:
                    raise DataError(f"{self.path} became shorter while it was read. Start again.")
                left -= len(block)
                text = rest + block
                cut = text.rfind(b"\n") + 1 if left else len(text)
                if text[:cut]:
                    yield text[:cut].decode()
                rest = text[cut:]

    def read_bytes(self) -> bytes:
        """Return all the bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start)


@dataclass(frozen=True)
class _Lines:
    """Hashes of the distinct lines of a file, stripped, the `num_short` short ones first."""

    hashes: NDArray[np.uint64]
    num_short: int


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to evaluate on; `skipped` maps file names to reasons."""

    root: Path
    train: tuple[Document, ...]
    heldout: tuple[Document, ...]
    skipped: dict[str, str]

    @property
    def sha256(self) -> str:
        """Hash of all names, sides and contents."""
        total = hashlib.sha256()
        for side in (self.train, self.heldout):
            for document in side:
                total.update(f"{document.name}\0{document.start}\0{document.sha256}\0".encode())
            total.update(b"\n")
        return total.hexdigest()

    def describe(self) -> dict[str, object]:
        """Make the content of `corpus.json`."""
        return {
            "root": str(self.root),
            "sha256": self.sha256,
            "train": [_describe(document) for document in self.train],
            "heldout": [_describe(document) for document in self.heldout],
            "skipped": self.skipped,
        }


def num_bytes(documents: Sequence[Document]) -> int:
    """Total size of some documents."""
    return sum(document.end - document.start for document in documents)


def find_corpus(data: str, settings: CorpusSettings, *, split: bool = True) -> Corpus:
    """Find, check and split the text under `data`: a file, a folder, or "stdlib".

    Without a split all of it is held out.

    Raises DataError for a missing path, no text at all, or a file that is not UTF-8 text (unless
    `settings.undecodable` is "skip").
    """
    root, paths = _stdlib_files() if data == STDLIB else _user_files(Path(data), settings)
    documents: list[Document] = []
    line_sets: list[_Lines] = []
    skipped: dict[str, str] = {}
    for path in paths:
        name = path.relative_to(root).as_posix() if path != root else path.name
        content = path.read_bytes()
        if reason := _why_not_text(content):
            if settings.undecodable == "error" and data != STDLIB:
                raise DataError(
                    f"{path} is not text: {reason}. Remove it, choose files with "
                    "--set corpus.suffixes=.txt, or leave such files out with "
                    "--set corpus.undecodable=skip."
                )
            skipped[name] = reason
        elif content.strip():
            documents.append(Document(name, path, 0, len(content), _sha256(content)))
            line_sets.append(_line_hashes(content))
        else:
            skipped[name] = "empty"
    if not documents:
        raise DataError(
            f"{data} holds no text: {len(paths)} files looked at, {len(skipped)} empty or not text."
        )
    if not split:
        return Corpus(root, (), tuple(documents), skipped)
    train, heldout = _split(documents, line_sets, settings.heldout_fraction)
    return Corpus(root, tuple(train), tuple(heldout), skipped)


def _stdlib_files() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_paths()["stdlib"]).resolve()
    return root, _walk(root, (".py",))


def _user_files(root: Path, settings: CorpusSettings) -> tuple[Path, list[Path]]:
    if not root.exists():
        raise DataError(f"data={str(root)!r} does not exist. Give a file, a folder, or {STDLIB!r}.")
    root = root.resolve()
    if root.is_file():
        return root, [root]
    paths = _walk(root, settings.suffixes)
    if not paths:
        wanted = f" ending in {', '.join(settings.suffixes)}" if settings.suffixes else ""
        raise DataError(f"data={str(root)!r} has no files{wanted}.")
    return root, paths


def _walk(root: Path, suffixes: Sequence[str]) -> list[Path]:
    """All plain files below a folder by name; no hidden ones, links or installed packages."""
    found: list[Path] = []
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or path.name in _SKIPPED_FOLDERS or path.is_symlink():
            continue
        if path.is_dir():
            found += _walk(path, suffixes)
        elif path.is_file() and (not suffixes or path.suffix in suffixes):
            found.append(path)
    return found


def _why_not_text(content: bytes) -> str | None:
    if (at := content.find(b"\0")) >= 0:
        return f"a zero byte at {at}"
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f"no UTF-8 at byte {error.start}"
    return None


def _line_hashes(content: bytes) -> _Lines:
    lines = sorted({line.strip() for line in content.split(b"\n")} - {b""}, key=len)
    digests = b"".join(hashlib.blake2b(line, digest_size=8).digest() for line in lines)
    num_short = sum(len(line) < _TELLING_LINE_BYTES for line in lines)
    return _Lines(np.frombuffer(digests, dtype=np.uint64), num_short)


def _split(
    documents: list[Document], line_sets: list[_Lines], fraction: float
) -> tuple[list[Document], list[Document]]:
    if len(documents) == 1:
        return _split_one(documents[0], fraction)
    numbers = _group(line_sets)
    if len(set(numbers)) == 1:
        warnings.warn(
            "all files share most of their lines with another, so the held-out ones have been seen "
            "in part: their bits per byte will look better than on other text",
            stacklevel=2,
        )
        numbers = list(range(len(documents)))
    groups: dict[int, list[Document]] = {}
    for document, number in zip(documents, numbers, strict=True):
        groups.setdefault(number, []).append(document)
    wanted_bytes = fraction * num_bytes(documents)
    heldout: list[Document] = []
    # In the order of a hash of the names: as good as random, and the same on every machine.
    for members in sorted(
        groups.values(), key=lambda members: hashlib.sha256(members[0].name.encode()).digest()
    ):
        if num_bytes(heldout) + num_bytes(members) <= wanted_bytes * 1.1:
            heldout += members
        if num_bytes(heldout) >= wanted_bytes * 0.9:
            break
    if not heldout:  # every group is large: the smallest is held out
        heldout = min(groups.values(), key=num_bytes)
    held = {document.name for document in heldout}
    return [document for document in documents if document.name not in held], sorted(
        heldout, key=lambda d: d.name
    )


def _split_one(document: Document, fraction: float) -> tuple[list[Document], list[Document]]:
    """Hold out the end of a single file, from a line's start."""
    content = document.read_bytes()
    cut = content.rfind(b"\n", 0, int(len(content) * (1 - fraction))) + 1
    if not content[:cut].strip() or not content[cut:].strip():
        raise DataError(
            f"{document.path} is too short to split into train and held-out text. Add more text."
        )
    sides = [
        Document(document.name, document.path, start, end, _sha256(content[start:end]))
        for start, end in ((0, cut), (cut, len(content)))
    ]
    return [sides[0]], [sides[1]]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _group(line_sets: list[_Lines]) -> list[int]:
    """Number the groups of files that must stay together.

    Two files are tied if they share over half of the distinct lines of both, or over half of the
    telling (long) lines of one: a file copied into a larger one. Short lines alone would tie most
    programs.
    """
    leader = list(range(len(line_sets)))
    everything = [lines.hashes for lines in line_sets]
    telling = [lines.hashes[lines.num_short :] for lines in line_sets]
    for sets, of_both in ((everything, True), (telling, False)):
        sizes = np.array([len(hashes) for hashes in sets])
        for file, shared in enumerate(_shared_lines(sets)):
            half_of = np.maximum(sizes, sizes[file]) if of_both else sizes[file]
            for other in np.flatnonzero(2 * shared > half_of):
                _join(leader, file, int(other))
    return [_find(leader, file) for file in range(len(line_sets))]


def _shared_lines(sets: list[NDArray[np.uint64]]) -> Iterator[NDArray[np.int64]]:
    """For each set in turn, how many of its lines each set has, itself left out."""
    lines = np.concatenate(sets)
    owners = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    order = np.argsort(lines, kind="stable")
    lines, owners = lines[order], owners[order]
    starts = (
        np.flatnonzero(np.concatenate(([True], lines[1:] != lines[:-1])))
        if len(lines)
        else lines[:0]
    )
    ends = np.append(starts[1:], len(lines)).astype(np.int64)
    place_of = np.searchsorted(lines[starts], np.concatenate(sets))
    before = 0
    for file, hashes in enumerate(sets):
        places = place_of[before : before + len(hashes)]
        before += len(hashes)
        num_files = ends[places] - starts[places]
        places = places[(num_files > 1) & (num_files <= _COMMON_LINE_FILES)]
        holders = [owners[starts[i] : ends[i]] for i in places]
        shared = np.bincount(
            np.concatenate(holders) if holders else owners[:0], minlength=len(sets)
        )
        shared[file] = 0
        yield shared


def _find(leader: list[int], file: int) -> int:
    while leader[file] != file:
        leader[file] = leader[leader[file]]
        file = leader[file]
    return file


def _join(leader: list[int], first: int, second: int) -> None:
    a, b = _find(leader, first), _find(leader, second)
    leader[max(a, b)] = min(a, b)


def _describe(document: Document) -> dict[str, object]:
    return {
        "name": document.name,
        "start": document.start,
        "bytes": document.end - document.start,
        "sha256": document.sha256,
    }
