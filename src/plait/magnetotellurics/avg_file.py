"""Read AVG files of Zonge International: one table of magnitudes and phases for each element.

Keywords begin with "$", tables with a line of column names. Z.mag is in mV/km/nT (its square times
0.2 / f is the file's own ARes.mag, which is checked), Z.phz in milliradians for e^{+i w t}.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plait.magnetotellurics.survey import OHM_PER_FIELD_UNIT, Station
from plait.magnetotellurics.text_lines import TextLines, read_text_lines

_ELEMENT = {"ZXX": (0, 0), "ZXY": (0, 1), "ZYX": (1, 0), "ZYY": (1, 1)}
_NEEDED = ("SKP", "FREQ", "Z.MAG", "Z.PHZ", "ARES.MAG", "ARES.%ERR")
_GOOD = 2  # of the column Skp; smaller numbers mark data that the processing skipped


@dataclass(frozen=True, kw_only=True)
class _Datum:
    element: tuple[int, int]
    frequency_hz: float
    impedance_ohm: complex
    error_ohm: float


def read_avg_file(path: str | Path) -> Station:
    """Read one AVG file; x points to the heading of $Rx.HPR.

    Skipped data and tippers (in a unit that the format does not state) are dropped and noted. The
    error is half the relative error of apparent resistivity.

    Raises:
        SurveyError: with file and line: no table or element name, a row that does not fit the
            columns, the same datum twice, a magnitude that its apparent resistivity contradicts.
    """
    lines = read_text_lines(path)
    keywords: dict[str, tuple[int, str]] = {}
    columns: list[str] = []
    data: dict[tuple[tuple[int, int], float], _Datum] = {}
    skipped, others = 0, set()
    for number in range(1, lines.num_lines + 1):
        text = lines.line(number).strip()
        found = re.match(r"\$\s*([^=]+?)\s*=\s*(.*)$", text)
        if found:
            keywords[found.group(1).upper()] = (number, found.group(2).strip())
        elif text.upper().startswith("SKP"):
            columns = [word.strip().upper() for word in text.split(",")]
            absent = [name for name in _NEEDED if name not in columns]
            if absent:
                lines.fail(number, f"no column {', '.join(absent)}")
        elif text and not text.startswith(("\\", "/", "!", '"')):
            if not columns or "RX.CMP" not in keywords:
                lines.fail(number, "a row before the column names or before $Rx.Cmp")
            words = [word.strip() for word in text.split(",")]
            if len(words) != len(columns):
                lines.fail(number, f"a row holds {len(words)} values, expected {len(columns)}")
            name = keywords["RX.CMP"][1].upper().removesuffix("R")
            row = dict(zip(columns, words, strict=True))
            if name not in _ELEMENT:
                if not re.fullmatch(r"(?!Z)[A-Z]{3}", name):
                    lines.fail(keywords["RX.CMP"][0], f"unknown element {name!r}")
                others.add(name)
            elif lines.whole(number, row["SKP"], what="Skp") < _GOOD:
                skipped += 1
            else:
                datum = _read_row(lines, number, row, _ELEMENT[name])
                key = (datum.element, datum.frequency_hz)
                if key in data:
                    lines.fail(number, f"{name} at {datum.frequency_hz:g} Hz stands twice")
                data[key] = datum
    if not data:
        lines.fail(lines.num_lines, "no impedance that is not skipped")
    notes = [f"{skipped} values marked as skipped dropped"] if skipped else []
    notes += [
        f"{name} dropped: " + ("its unit is not stated" if name[0] == "T" else "no impedance")
        for name in sorted(others)
    ]
    return _station(lines, list(data.values()), keywords, tuple(notes))


def _read_row(
    lines: TextLines, number: int, row: dict[str, str], element: tuple[int, int]
) -> _Datum:
    frequency, magnitude, phase, rho, percent = (
        lines.number(number, row[name], what=name) for name in _NEEDED[1:]
    )
    if min(frequency, magnitude, rho) <= 0 or percent < 0:
        lines.fail(number, "frequency, magnitude and apparent resistivity must be positive")
    # The columns hold five digits and few of a small error; a wrong unit would be far off.
    if abs(0.2 / frequency * magnitude**2 / rho - 1) > 0.02:
        lines.fail(number, f"ARes.mag {rho:g} does not fit Z.mag {magnitude:g} in mV/km/nT")
    size = magnitude * OHM_PER_FIELD_UNIT
    return _Datum(
        element=element,
        frequency_hz=frequency,
        impedance_ohm=size * complex(np.exp(1e-3j * phase)),
        error_ohm=size * percent / 200 if percent > 0 else float("nan"),
    )


def _station(
    lines: TextLines,
    data: list[_Datum],
    keywords: dict[str, tuple[int, str]],
    notes: tuple[str, ...],
) -> Station:
    frequency = np.array(sorted({datum.frequency_hz for datum in data}, reverse=True))
    index = {value: f for f, value in enumerate(frequency)}
    impedance = np.full((len(frequency), 2, 2), np.nan + 0j)
    error = np.full((len(frequency), 2, 2), np.nan)
    for datum in data:
        impedance[(index[datum.frequency_hz], *datum.element)] = datum.impedance_ohm
        error[(index[datum.frequency_hz], *datum.element)] = datum.error_ohm

    def number_of(name: str, otherwise: float) -> float:
        if name not in keywords:
            return otherwise
        line, text = keywords[name]
        return lines.number(line, re.split(r"[,\s]", text)[0], what=f"${name}")

    line, name = keywords.get("STN.NAME", keywords.get("RX.GDPSTN", (1, lines.path.stem)))
    if not name:
        lines.fail(line, "the station has no name")
    return Station(
        name="_".join(name.strip('"').split()),
        frequency_hz=frequency,
        impedance_ohm=impedance,
        impedance_error_ohm=error,
        tipper=np.full((len(frequency), 2), np.nan + 0j),
        tipper_error=np.full((len(frequency), 2), np.nan),
        rotation_deg=np.full(len(frequency), number_of("RX.HPR", 0.0)),
        latitude_deg=number_of("GPS.LAT", float("nan")),
        longitude_deg=number_of("GPS.LON", float("nan")),
        notes=notes,
        source=lines.path,
    )
