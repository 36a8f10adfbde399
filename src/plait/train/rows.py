"""Rows of data: JSON lines, Parquet, and folders that the `datasets` library saved.

A row is a record with a place to name it by. What cannot be read is a problem with its place: the
end of the run, or counted and named if the user asked to skip it. Memory does not grow with files.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plait.checkpoint.json_file import read_json_object
from plait.errors import DataError, MissingExtraError

OnBadRow = Literal["error", "skip"]
SUFFIXES = (".jsonl", ".ndjson", ".parquet")
_LONGEST_LINE_BYTES = 64 * 2**20
_BATCH_ROWS = 1024
_NAMED = 100
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])")
_ABOUT = re.compile(r"\.|readme|license|notice|citation|dataset_info|metadata", re.IGNORECASE)
_END_OF_STREAM = bytes.fromhex("ffffffff00000000")  # [Arrow columnar format, IPC streaming format]


@dataclass(frozen=True)
class Row:
    """place: "file:line" of JSON lines, "file:row" of the others, counted from 1."""

    place: str
    value: Mapping[str, Any]


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used, and why."""

    place: str
    reason: str


@dataclass
class Problems:
    """What to do with problems, and those met so far: all counted, the first hundred named."""

    on_bad_row: OnBadRow = "error"
    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Count a problem; raises DataError unless problems are to be skipped."""
        if self.on_bad_row == "error":
            raise DataError(
                f"{problem.place}: {problem.reason}. Mend it, or leave out what cannot be used "
                "with --set on_bad_row=skip."
            )
        self.count += 1
        if len(self.named) < _NAMED:
            self.named.append(f"{problem.place}: {problem.reason}")


def is_row_data(data: str) -> bool:
    """Say whether a path is read row by row."""
    path = Path(data)
    if path.is_dir():
        return is_saved_dataset(path) or any(row_files(path))
    return path.suffix in SUFFIXES


def row_files(path: Path) -> list[Path]:
    """Files of rows, by name: in a folder and below, of a pattern such as `train-*`, or the one."""
    if path.is_dir():
        return [each for each in _files_of(path) if each.suffix in SUFFIXES]
    if "*" in path.name and not path.exists():
        return sorted(filter(_is_file, path.parent.glob(path.name)))
    return [path]


def other_files(path: Path) -> list[Path]:
    """Files in a folder of rows that are none, but for hidden ones and those about the data."""
    if not path.is_dir() or is_saved_dataset(path):
        return []
    others = (each for each in _files_of(path) if each.suffix not in SUFFIXES)
    return [each for each in others if not _ABOUT.match(each.name)]


def _files_of(folder: Path) -> list[Path]:
    return sorted(filter(_is_file, folder.rglob("*")))


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def read_rows(data: str | Path) -> Iterator[Row | Problem]:
    """Yield the rows of files or a folder in order (see `row_files`).

    Raises DataError if there are no files, or if a folder has files of several splits.
    """
    path = Path(data)
    files = row_files(path)
    if not path.exists() and files in ([], [path]):
        raise DataError(f"{path} does not exist.")
    if path.is_dir() and is_saved_dataset(path):
        yield from _saved_dataset(path)
        return
    if not files:
        raise DataError(f"{path} holds no files that end in {', '.join(SUFFIXES)}.")
    if path.is_dir():
        _check_splits(path, files)
    for file in files:
        if file.suffix == ".parquet":
            yield from _parquet(file)
        elif file.suffix in SUFFIXES:
            yield from _json_lines(file)
        else:
            raise DataError(f"{file} is not read row by row; known: {', '.join(SUFFIXES)}.")


def _check_splits(folder: Path, files: list[Path]) -> None:
    found = {match[0]: file for file in files if (match := _SPLIT.match(file.name))}
    if len(found) > 1:
        examples = (str(file.parent / f"{split}*{file.suffix}") for split, file in found.items())
        raise DataError(f"{folder} holds several splits. Name one: {', '.join(examples)}.")


def keep_rows(rows: Iterable[Row | Problem], problems: Problems) -> Iterator[Row]:
    """Pass rows on, hand problems over."""
    for row in rows:
        if isinstance(row, Problem):
            problems.add(row)
        else:
            yield row


def text_field(row: Row, name: str) -> str | Problem:
    """Text of a field, or why there is none."""
    if name not in row.value:
        return Problem(row.place, f"has no field {name!r}, but {', '.join(row.value) or 'none'}")
    text = row.value[name]
    if not isinstance(text, str) or not text:
        return Problem(row.place, f"{name!r} is {text!r:.60}, not a text")
    if not is_unicode(text):
        return Problem(row.place, f"{name!r} holds half of a surrogate pair")
    return text


def is_unicode(text: str) -> bool:
    """Say whether a text can be written; JSON may spell halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _json_lines(path: Path) -> Iterator[Row | Problem]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE_BYTES):
            number += 1
            place = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)  # as some editors write it
            if len(line) == _LONGEST_LINE_BYTES and not line.endswith(b"\n"):
                yield Problem(place, f"a line of more than {_LONGEST_LINE_BYTES:,} bytes")
                while (rest := file.readline(_LONGEST_LINE_BYTES)) and not rest.endswith(b"\n"):
                    continue
            elif line.strip():
                yield _parse_line(place, line)


def _parse_line(place: str, line: bytes) -> Row | Problem:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Problem(place, f"no UTF-8 at byte {error.start} of the line")
    except (json.JSONDecodeError, RecursionError) as error:
        return Problem(place, f"no JSON: {error}")
    if not isinstance(value, dict):
        return Problem(place, f"a JSON {type(value).__name__}, not an object")
    return Row(place, value)


def _parquet(path: Path) -> Iterator[Row | Problem]:
    parquet = _pyarrow("pyarrow.parquet")
    try:
        batches = parquet.ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS)
        yield from _arrow_rows(path, batches)
    except (_pyarrow("pyarrow").ArrowException, OSError) as error:
        yield Problem(str(path), f"not a whole Parquet file: {error}")


def _arrow_rows(path: Path, batches: Iterable[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield Row(f"{path}:{number}", value)


def is_saved_dataset(folder: Path) -> bool:
    """Say whether the `datasets` library saved a data set, or several splits, in a folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _saved_dataset(folder: Path) -> Iterator[Row | Problem]:
    if (folder / "dataset_dict.json").is_file():
        splits = read_json_object(folder / "dataset_dict.json").get("splits") or []
        raise DataError(
            f"{folder} holds several splits. Name one: "
            f"{', '.join(str(folder / str(split)) for split in splits)}."
        )
    arrow, ipc = _pyarrow("pyarrow"), _pyarrow("pyarrow.ipc")
    for entry in read_json_object(folder / "state.json").get("_data_files") or []:
        name = str(entry.get("filename"))
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise DataError(f"{folder / 'state.json'} names {name!r}, which is not there.")
        try:
            with arrow.memory_map(str(path)) as source:
                yield from _arrow_rows(path, ipc.open_stream(source))
            if not _ends_with(path, _END_OF_STREAM):  # cut between two batches it reads as whole
                yield Problem(str(path), "not a whole Arrow file: its end is missing")
        except (arrow.ArrowException, OSError) as error:
            yield Problem(str(path), f"not a whole Arrow file: {error}")


def _ends_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        file.seek(-len(mark), 2)
        return file.read() == mark


def _pyarrow(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            "Parquet files and saved datasets need pyarrow: pip install 'plait[data]'."
        ) from error
