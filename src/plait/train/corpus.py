"""The text of a run: which files, split into train and held-out, with a hash of every byte.

The split is by file and depends on names and contents alone. Files that share over half of their
lines stay together (`_group`), so that the held-out side is not a copy of the train side.
"""

import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from plait.errors import ConfigError, DataError
from plait.train.near_copies import group_near_copies
from plait.train.text_file import Lines, cut_at_line_ends, read_blocks, read_text_file

STDLIB = "stdlib"
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "node_modules"})


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
        """Yield the text in pieces of about a megabyte, cut at line ends: memory stays flat.

        Raises DataError if the file is not what it was when the corpus was made.
        """
        total = hashlib.sha256()
        for content in cut_at_line_ends(read_blocks(self.path, self.start, self.end)):
            total.update(content)
            yield content.decode()
        if total.hexdigest() != self.sha256:
            raise DataError(f"{self.path} changed while it was read. Start again.")

    def read_bytes(self) -> bytes:
        """Return all the bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start)


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
                total.update(os.fsencode(document.name))
                total.update(f"\0{document.start}\0{document.sha256}\0".encode())
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
    line_sets: list[Lines] = []
    skipped: dict[str, str] = {}
    for path in paths:
        name = path.relative_to(root).as_posix() if path != root else path.name
        content = read_text_file(path)
        if content.problem is None:
            documents.append(Document(name, path, 0, content.num_bytes, content.sha256))
            line_sets.append(content.lines)
        elif content.is_empty or settings.undecodable == "skip" or data == STDLIB:
            skipped[name] = content.problem
        else:
            raise DataError(
                f"{path} is not text: {content.problem}. Remove it, choose files with "
                "--set corpus.suffixes=.txt, or leave such files out with "
                "--set corpus.undecodable=skip."
            )
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
    if not root.is_dir():
        raise DataError(f"data={str(root)!r} is neither a file nor a folder.")
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


def _split(
    documents: list[Document], line_sets: list[Lines], fraction: float
) -> tuple[list[Document], list[Document]]:
    if len(documents) == 1:
        return _split_one(documents[0], fraction)
    numbers = group_near_copies(line_sets)
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
        groups.values(), key=lambda members: hashlib.sha256(os.fsencode(members[0].name)).digest()
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
    wanted = int(document.end * (1 - fraction))
    cut = position = 0
    for block in cut_at_line_ends(read_blocks(document.path, 0, wanted)):
        position += len(block)
        if block.endswith(b"\n"):
            cut = position
    sides = [_part(document, 0, cut), _part(document, cut, document.end)]
    if not all(any(b.strip() for b in read_blocks(d.path, d.start, d.end)) for d in sides):
        raise DataError(
            f"{document.path} is too short to split into train and held-out text. Add more text."
        )
    return [sides[0]], [sides[1]]


def _part(document: Document, start: int, end: int) -> Document:
    total = hashlib.sha256()
    for block in read_blocks(document.path, start, end):
        total.update(block)
    return Document(document.name, document.path, start, end, total.hexdigest())


def _describe(document: Document) -> dict[str, object]:
    return {
        "name": document.name,
        "start": document.start,
        "bytes": document.end - document.start,
        "sha256": document.sha256,
    }
