"""Read MT2DData_1.0 files, the text format of HMCMT2D's COPROD2 example: impedances in ohm."""

from pathlib import Path

from plait.magnetotellurics.impedance_table import ImpedanceTable
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.text_lines import TextLines, read_text_lines

_REAL_PART = {"ZXY": Component.TE_REAL, "ZYX": Component.TM_REAL}


def read_mt2d_data(path: str | Path) -> Observations:
    """Read an MT2DData_1.0 file: Zxy as TE, Zyx as TM, in ohm with e^{+i w t}.

    Raises:
        SurveyError: with file and line: another format or data type, a count that does not hold.
    """
    lines = read_text_lines(path)
    if lines.line(1).split() != ["Format:", "MT2DData_1.0"]:
        lines.fail(1, "expected 'Format: MT2DData_1.0'")
    receivers, number = _section(lines, 2, "Receiver Location (m):", width=2)
    frequencies, number = _section(lines, number, "Frequencies (Hz):", width=1)
    if lines.line(number).split()[1:] != ["Impedance"]:
        lines.fail(number, "expected 'DataType: Impedance'")
    words = lines.line(number + 1).split()
    if words[:1] != ["DataComp:"] or len(words) != 2:
        lines.fail(number + 1, "expected 'DataComp: n'")
    count = lines.whole(number + 1, words[1], what="DataComp")
    names = [lines.line(number + 2 + row).strip() for row in range(count)]
    for row, name in enumerate(names):
        if name not in _REAL_PART:
            lines.fail(number + 2 + row, f"unknown component {name!r}, expected ZXY or ZYX")
    rows, number = _section(lines, number + 2 + count, "Data Block:", width=6)
    table = ImpedanceTable()
    for line, (f, r, kind, real, imag, error) in rows:
        for value, limit in ((f, len(frequencies)), (r, len(receivers)), (kind, len(names))):
            if value != int(value) or not 1 <= value <= limit:
                lines.fail(line, f"index {value:g} is not between 1 and {limit}")
        if error <= 0:
            lines.fail(line, f"the error {error} is not positive")
        table.add(
            frequency_hz=frequencies[int(f) - 1][1][0],
            name=f"{int(r):03d}",
            position_m=receivers[int(r) - 1][1][0],
            real=_REAL_PART[names[int(kind) - 1]],
            value=complex(real, imag),
            error=error,
        )
    full = len(frequencies) * len(receivers) * len(names)
    notes = (f"{full - len(rows)} of {full} impedances are absent",) if len(rows) < full else ()
    return table.observations(notes)


def _section(
    lines: TextLines, number: int, title: str, *, width: int
) -> tuple[list[tuple[int, list[float]]], int]:
    """Read the counted rows under a title; comments may stand before and after the title."""
    while lines.line(number).lstrip().startswith("#"):
        number += 1
    text = lines.line(number).strip()
    if not text.startswith(title):
        lines.fail(number, f"expected {title!r}")
    count = lines.whole(number, text[len(title) :].strip(), what=title)
    number += 1
    while lines.line(number).lstrip().startswith("#"):
        number += 1
    rows = []
    for line in range(number, number + count):
        words = lines.line(line).split()
        if len(words) != width:
            lines.fail(line, f"{title} a row holds {len(words)} words, expected {width}")
        rows.append((line, [lines.number(line, word, what=title) for word in words]))
    return rows, number + count
