"""Read J files (A. G. Jones, "J-format", 1994), as BIRRP writes them.

Blocks "ZXX S.I." or "ZXX field", a count, and rows: period, real, imaginary, error, weight,
coherence. Blocks "RXX" repeat the impedances as apparent resistivities and phases.
"""

import re
from pathlib import Path

import numpy as np

from plait.magnetotellurics.survey import MU_0, OHM_PER_FIELD_UNIT, Station
from plait.magnetotellurics.text_lines import TextLines, read_text_lines

_ELEMENT = {
    "ZXX": (0, 0), "ZXY": (0, 1), "ZYX": (1, 0), "ZYY": (1, 1), "TZX": (2, 0), "TZY": (2, 1),
    "RXX": (0, 0), "RXY": (0, 1), "RYX": (1, 0), "RYY": (1, 1),
}  # fmt: skip
_NO_VALUE = -999.0


def read_j_file(path: str | Path) -> Station:
    """Read one J file.

    The word S.I. of BIRRP's files is not to be trusted: where the file's own apparent
    resistivities fit mV/km/nT and not ohm, mV/km/nT is taken and a note says so.

    Raises:
        SurveyError: with file and line: a block that is too short, an unknown unit, impedances
            and apparent resistivities that fit in neither unit.
    """
    lines = read_text_lines(path)
    number, header = _header(lines)
    name = lines.line(number).split()
    if not name:
        lines.fail(number, "expected the station's name")
    blocks, units = _blocks(lines, number + 1)
    if not any(key[0] in "ZT" for key in blocks):
        lines.fail(lines.num_lines, "no impedance and no tipper block")
    notes = [f"no {key} in the file" for key in ("LATITUDE", "LONGITUDE") if key not in header]
    period = np.unique(
        np.concatenate([rows[:, 0] for key, rows in blocks.items() if key[0] != "R"])
    )
    values = np.full((len(period), 3, 2), np.nan + 0j)
    errors = np.full((len(period), 3, 2), np.nan)
    for key, rows in blocks.items():
        if key[0] == "R":
            continue
        where = np.searchsorted(period, rows[:, 0])
        if len(np.unique(where)) < len(where):
            notes.append(f"{key}: periods given twice; the last one holds")
        i, j = _ELEMENT[key]
        values[where, i, j] = rows[:, 1] + 1j * rows[:, 2]
        errors[where, i, j] = rows[:, 3]
    factor = _ohm_per_unit(lines, blocks, units, notes)
    yx = values[:, 1, 0]
    yx = yx[np.isfinite(yx)]
    if yx.size and np.median(np.angle(yx)) > 0:
        notes.append("Zyx lies in the second quadrant: the file may be written for e^{-i w t}")
    return Station(
        name=name[0],
        frequency_hz=1 / period,
        impedance_ohm=values[:, :2] * complex(factor),
        impedance_error_ohm=errors[:, :2] * factor,
        tipper=values[:, 2],
        tipper_error=errors[:, 2],
        rotation_deg=np.full(len(period), header.get("AZIMUTH", 0.0)),
        latitude_deg=header.get("LATITUDE", float("nan")),
        longitude_deg=header.get("LONGITUDE", float("nan")),
        elevation_m=header.get("ELEVATION", float("nan")),
        notes=tuple(notes),
        source=lines.path,
    )


def _header(lines: TextLines) -> tuple[int, dict[str, float]]:
    header: dict[str, float] = {}
    number = 1
    while lines.line(number).lstrip().startswith(("#", ">")):
        match = re.match(r"\s*>\s*(\w+)\s*=\s*(\S*)", lines.line(number))
        if match and match.group(2):
            header[match.group(1).upper()] = lines.number(
                number, match.group(2), what=match.group(1)
            )
        number += 1
    return number, header


def _blocks(lines: TextLines, number: int) -> tuple[dict[str, np.ndarray], set[str]]:
    blocks: dict[str, np.ndarray] = {}
    units: set[str] = set()
    while number <= lines.num_lines:
        words = lines.line(number).upper().split()
        if not words:
            number += 1
            continue
        if words[0] not in _ELEMENT:
            lines.fail(number, f"unknown block {words[0]!r}, expected {', '.join(_ELEMENT)}")
        if words[0][0] == "Z":
            units.add(words[1] if len(words) > 1 else "FIELD")
        count = lines.whole(number + 1, lines.line(number + 1).strip(), what="count")
        width = 9 if words[0][0] == "R" else 6
        taken = lines.take(number + 2, count * width, what=words[0])
        rows = taken.values.reshape(count, width)
        rows = rows[rows[:, 0] != _NO_VALUE]
        # A negative number is a frequency in this format [Jones 1994].
        rows[:, 0] = np.where(rows[:, 0] < 0, -1 / rows[:, 0], rows[:, 0])
        if (rows[:, 0] <= 0).any():
            lines.fail(number, f"{words[0]} holds a period that is not positive")
        blocks[words[0]] = rows
        number = taken.next_line
    unknown = units - {"S.I.", "SI", "FIELD"}
    if unknown:
        lines.fail(1, f"unknown unit {unknown}, expected S.I. or field")
    return blocks, units


def _ohm_per_unit(
    lines: TextLines, blocks: dict[str, np.ndarray], units: set[str], notes: list[str]
) -> float:
    said = OHM_PER_FIELD_UNIT if units == {"FIELD"} else 1.0
    ratios = []
    for key in ("XY", "YX"):
        if f"Z{key}" in blocks and f"R{key}" in blocks:
            z, rho = blocks[f"Z{key}"], blocks[f"R{key}"]
            both, at_z, at_rho = np.intersect1d(z[:, 0], rho[:, 0], return_indices=True)
            square = z[at_z, 1] ** 2 + z[at_z, 2] ** 2
            ratios.append(rho[at_rho, 1] / (square * both / (2 * np.pi * MU_0)))
    if not ratios:
        return said
    ratio = np.sqrt(np.median(np.concatenate(ratios)))
    for unit, factor in (("ohm", 1.0), ("mV/km/nT", OHM_PER_FIELD_UNIT)):
        if abs(ratio / factor - 1) < 0.05:
            if factor != said:
                notes.append(
                    f"the file says {'/'.join(units)}, but its apparent resistivities fit {unit}"
                )
            return factor
    return lines.fail(1, "impedances and apparent resistivities fit neither ohm nor mV/km/nT")
