"""A text file as numbered lines, so that every error of a reader names its file and line."""

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from plait.errors import SurveyError


@dataclass(frozen=True)
class TextLines:
    """The lines of one file, without their ends; line numbers start at 1."""

    path: Path
    lines: tuple[str, ...]

    @property
    def num_lines(self) -> int:
        """How many lines the file has."""
        return len(self.lines)

    def line(self, number: int) -> str:
        """Give line number (from 1), or raise SurveyError where the file has ended."""
        if number > len(self.lines):
            self.fail(len(self.lines), "the file ends too early")
        return self.lines[number - 1]

    def fail(self, number: int, message: str) -> NoReturn:
        """Raise SurveyError with the file and the line."""
        raise SurveyError(f"{self.path}:{max(number, 1)}: {message}")

    def number(self, number: int, word: str, *, what: str) -> float:
        """Turn one word of a line into a finite float; Fortran exponents (1D5) are read too."""
        try:
            value = float(word.replace("D", "E").replace("d", "e"))
        except ValueError:
            self.fail(number, f"{what}: {word!r} is not a number")
        if not np.isfinite(value):
            self.fail(number, f"{what}: {word!r} is not finite")
        return value

    def whole(self, number: int, word: str, *, what: str) -> int:
        """Turn one word of a line into an integer."""
        value = self.number(number, word, what=what)
        if value != int(value):
            self.fail(number, f"{what}: {word!r} is not a whole number")
        return int(value)

    def numbers(self, first: int, last: int, *, what: str) -> np.ndarray:
        """Read every word of lines first to last (both included) as float64."""
        return np.array(
            [
                self.number(number, word, what=what)
                for number in range(first, last + 1)
                for word in self.line(number).split()
            ]
        )

    def take(self, first: int, count: int, *, what: str) -> "Taken":
        """Read count numbers from line first on; a line must not run over the count."""
        values: list[float] = []
        number = first
        while len(values) < count:
            if number > self.num_lines:
                self.fail(number - 1, f"{what}: {len(values)} numbers, expected {count}")
            values += [self.number(number, word, what=what) for word in self.line(number).split()]
            number += 1
        if len(values) > count:
            self.fail(number - 1, f"{what}: {len(values)} numbers, expected {count}")
        return Taken(values=np.array(values), next_line=number)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Numbers read from a file, and the line after them."""

    values: np.ndarray
    next_line: int


def read_text_lines(path: str | Path, *, end_marks: tuple[str, ...] = ()) -> TextLines:
    """Read a text file.

    A file must end with a line end or with one of end_marks. Otherwise its last number may have
    lost digits, and a wrong number is worse than an error.

    Raises:
        SurveyError: the file is absent, empty, or stops in the middle of a line.
    """
    path = Path(path)
    if not path.is_file():
        raise SurveyError(f"{path}: no such file")
    text = path.read_bytes().decode("utf-8", errors="replace")
    if not text.strip():
        raise SurveyError(f"{path}:1: the file is empty")
    lines = TextLines(path, tuple(text.splitlines()))
    ends_well = text[-1] in "\r\n\x1a" or text.rstrip().upper().endswith(end_marks or ("\n",))
    if not ends_well:
        lines.fail(lines.num_lines, "the file stops in the middle of a line")
    return lines
