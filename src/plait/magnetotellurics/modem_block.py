"""The blocks of ModEM's data files, 2-D and 3-D: six lines that begin with ">", then rows.

Source: Kelbert et al. 2014, Computers & Geosciences 66, 40-53, and ModEM's user guide, "data
files". A row holds period, site, latitude, longitude, X, Y, Z, component, the datum and its error.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from plait.magnetotellurics.survey import MU_0
from plait.magnetotellurics.text_lines import TextLines

_SI_PER_UNIT = {
    "[V/M]/[T]": MU_0,
    "[MV/KM]/[NT]": MU_0 * 1e3,
    "[V/M]/[A/M]": 1.0,
    "OHM": 1.0,
    "[]": 1.0,
}


@dataclass(frozen=True, kw_only=True)
class BlockHeader:
    """What the six lines say.

    Attributes:
        kind: the data type in capitals.
        factor: to SI units.
        conjugate: whether the file uses e^{-i w t}.
        orientation_deg: azimuth of x, clockwise from north.
        origin_deg: latitude and longitude of x = y = 0.
        num_periods, num_sites: as announced.
        first_row: the line after the header.
    """

    kind: str
    factor: float
    conjugate: bool
    orientation_deg: float
    origin_deg: tuple[float, float]
    num_periods: int
    num_sites: int
    first_row: int


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One row: names, places in metres, and a datum that is real where a kind has no phase."""

    line: int
    period_s: float
    site: str
    latitude_deg: float
    longitude_deg: float
    place_m: tuple[float, float, float]
    component: str
    value: complex
    error: float


def block_starts(lines: TextLines) -> Iterator[int]:
    """Give the line on which each block begins; text that belongs to no block is an error."""
    number, inside = 1, False
    while number <= lines.num_lines:
        text = lines.line(number).strip()
        if text.startswith(">"):
            yield number
            number += 6
            inside = True
        else:
            if text and not text.startswith("#") and not inside:
                lines.fail(number, "expected a header line that begins with '>' or a comment '#'")
            number += 1


def read_header(lines: TextLines, number: int, *, kinds: Collection[str]) -> BlockHeader:
    """Read six header lines.

    Raises:
        SurveyError: with file and line: fewer lines, an unknown kind, sign or unit.
    """
    header = []
    for offset in range(6):
        text = lines.line(number + offset).strip()
        if not text.startswith(">"):
            lines.fail(number + offset, "expected one of the six header lines that begin with '>'")
        header.append(text[1:].strip())
    kind = header[0].upper()
    if kind not in kinds:
        lines.fail(number, f"unknown data type {header[0]!r}, expected {', '.join(kinds)}")
    sign = header[1].replace(" ", "").replace("\\omega", "w").lower()
    if sign not in {"exp(-iwt)", "exp(+iwt)", "exp(iwt)"}:
        lines.fail(number + 1, f"unknown sign convention {header[1]!r}")
    unit = header[2].replace(" ", "").upper()
    if unit not in _SI_PER_UNIT:
        lines.fail(number + 2, f"unknown unit {header[2]!r}, expected {', '.join(_SI_PER_UNIT)}")
    turn = [lines.number(number + 3, word, what="orientation") for word in header[3].split()]
    origin = [lines.number(number + 4, word, what="origin") for word in header[4].split()]
    if len(turn) != 1 or len(origin) < 2:
        lines.fail(number + 3, "expected an orientation, and below it latitude and longitude")
    counts = header[5].split()
    if len(counts) != 2:
        lines.fail(number + 5, "expected the numbers of periods and sites")
    num_periods, num_sites = (lines.whole(number + 5, word, what="count") for word in counts)
    return BlockHeader(
        kind=kind,
        factor=_SI_PER_UNIT[unit],
        conjugate="-" in sign,
        orientation_deg=turn[0],
        origin_deg=(origin[0], origin[1]),
        num_periods=num_periods,
        num_sites=num_sites,
        first_row=number + 6,
    )


def read_rows(
    lines: TextLines, header: BlockHeader, *, is_complex: bool
) -> tuple[list[BlockRow], int]:
    """Read the rows of a block in SI units and e^{+i w t}, and give the line after them.

    Raises:
        SurveyError: with file and line: a row with the wrong number of words, a period or error
            that is not positive, the same datum twice, other counts than announced.
    """
    rows: list[BlockRow] = []
    seen: set[tuple[str, ...]] = set()
    number = header.first_row
    while number <= lines.num_lines and not lines.line(number).lstrip().startswith(("#", ">")):
        words = lines.line(number).split()
        if words:
            rows.append(_row(lines, number, words, header, is_complex=is_complex))
            key = (words[0], words[1], words[7].upper())
            if key in seen:
                lines.fail(
                    number, f"period {key[0]} s and site {key[1]} stand twice with {words[7]}"
                )
            seen.add(key)
        number += 1
    found = (len({key[0] for key in seen}), len({key[1] for key in seen}))
    if found != (header.num_periods, header.num_sites):
        lines.fail(
            number - 1,
            f"{header.kind} announces {header.num_periods} periods and {header.num_sites} sites "
            f"and holds {found[0]} and {found[1]}",
        )
    return rows, number


def _row(
    lines: TextLines, number: int, words: list[str], header: BlockHeader, *, is_complex: bool
) -> BlockRow:
    expected = 11 if is_complex else 10
    if len(words) != expected:
        lines.fail(number, f"a row holds {len(words)} words, expected {expected}")
    period = lines.number(number, words[0], what="period")
    if period <= 0:
        lines.fail(number, f"the period {period} s is not positive")
    places = [lines.number(number, words[i], what="a coordinate") for i in range(2, 7)]
    numbers = [lines.number(number, word, what="datum") for word in words[8:-1]]
    error = lines.number(number, words[-1], what="error")
    if error <= 0:
        lines.fail(number, f"the error {error} is not positive")
    imaginary = numbers[1] if is_complex else 0.0
    return BlockRow(
        line=number,
        period_s=period,
        site=words[1],
        latitude_deg=places[0],
        longitude_deg=places[1],
        place_m=(places[2], places[3], places[4]),
        component=words[7].upper(),
        value=complex(numbers[0], -imaginary if header.conjugate else imaginary) * header.factor,
        error=error * header.factor,
    )
