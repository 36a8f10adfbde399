"""Read and write ModEM data files for 2-D: TE and TM impedances and the TE tipper.

Source: Kelbert et al. 2014, Computers & Geosciences 66, 40-53, and ModEM's user guide, "data
files": blocks of six lines that begin with ">", then one row per period, site and component.
"""

from pathlib import Path

import numpy as np

from plait.errors import SurveyError
from plait.magnetotellurics.impedance_table import ImpedanceTable
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.survey import MU_0
from plait.magnetotellurics.text_lines import TextLines, read_text_lines

_REAL_PART = {
    "TE_IMPEDANCE": Component.TE_REAL,
    "TM_IMPEDANCE": Component.TM_REAL,
    "TX_TIPPER": Component.TIPPER_REAL,
}
_SI_PER_UNIT = {
    "[V/M]/[T]": MU_0,
    "[MV/KM]/[NT]": MU_0 * 1e3,
    "[V/M]/[A/M]": 1.0,
    "OHM": 1.0,
    "[]": 1.0,
}


def read_modem_data(path: str | Path) -> Observations:
    """Read a ModEM 2-D data file into ohm and e^{+i w t}.

    Errors of 1e15 and more, which ModEM's templates use for "none", are kept: such rows have no
    weight. The position is the column Y(m).

    Raises:
        SurveyError: with file and line: an unknown data type, unit or sign, a row with the wrong
            number of words, more or fewer periods or sites than announced.
    """
    lines = read_text_lines(path)
    table = ImpedanceTable()
    notes: list[str] = []
    number = 1
    while number <= lines.num_lines:
        if not lines.line(number).strip() or lines.line(number).lstrip().startswith("#"):
            number += 1
            continue
        number = _read_block(lines, number, table, notes)
    if not table.rows:
        lines.fail(lines.num_lines, "no data rows")
    return table.observations(tuple(notes))


def _read_block(lines: TextLines, number: int, table: ImpedanceTable, notes: list[str]) -> int:
    header = []
    for offset in range(6):
        text = lines.line(number + offset).strip()
        if not text.startswith(">"):
            lines.fail(number + offset, "expected one of the six header lines that begin with '>'")
        header.append(text[1:].strip())
    kind = header[0].upper()
    if kind not in _REAL_PART:
        lines.fail(number, f"unknown data type {header[0]!r}, expected {', '.join(_REAL_PART)}")
    sign = header[1].replace(" ", "").replace("\\omega", "w").lower()
    if sign not in {"exp(-iwt)", "exp(+iwt)", "exp(iwt)"}:
        lines.fail(number + 1, f"unknown sign convention {header[1]!r}")
    unit = header[2].replace(" ", "").upper()
    if unit not in _SI_PER_UNIT:
        lines.fail(number + 2, f"unknown unit {header[2]!r}, expected {', '.join(_SI_PER_UNIT)}")
    counts = header[5].split()
    if len(counts) != 2:
        lines.fail(number + 5, "expected the numbers of periods and sites")
    expected = tuple(lines.whole(number + 5, word, what="count") for word in counts)
    factor, conjugate = _SI_PER_UNIT[unit], "-" in sign
    first = number + 6
    number = first
    seen: set[tuple[str, str]] = set()
    while number <= lines.num_lines and not lines.line(number).lstrip().startswith(("#", ">")):
        words = lines.line(number).split()
        if words:
            key = _add_row(lines, number, words, _REAL_PART[kind], factor, conjugate, table)
            if key in seen:
                lines.fail(number, f"period {key[0]} s and site {key[1]} stand twice")
            seen.add(key)
        number += 1
    found = (len({key[0] for key in seen}), len({key[1] for key in seen}))
    if found != expected:
        lines.fail(
            number - 1,
            f"{kind} announces {expected[0]} periods and {expected[1]} sites and holds "
            f"{found[0]} and {found[1]}",
        )
    absent = expected[0] * expected[1] - len(seen)
    if absent:
        notes.append(f"{kind}: {absent} of {expected[0] * expected[1]} rows are absent")
    return number


def _add_row(
    lines: TextLines,
    number: int,
    words: list[str],
    real: Component,
    factor: float,
    conjugate: bool,
    table: ImpedanceTable,
) -> tuple[str, str]:
    if len(words) != 11:
        lines.fail(number, f"a row holds {len(words)} words, expected 11")
    period = lines.number(number, words[0], what="period")
    if period <= 0:
        lines.fail(number, f"the period {period} s is not positive")
    numbers = [lines.number(number, words[i], what="datum") for i in (8, 9)]
    error = lines.number(number, words[10], what="error")
    if error <= 0:
        lines.fail(number, f"the error {error} is not positive")
    table.add(
        frequency_hz=1 / period,
        name=words[1],
        position_m=lines.number(number, words[5], what="Y"),
        real=real,
        value=complex(numbers[0], -numbers[1] if conjugate else numbers[1]) * factor,
        error=error * factor,
    )
    return words[0], words[1]


def write_modem_data(path: str | Path, observations: Observations, *, title: str) -> None:
    """Write impedances and tippers as ModEM 2-D blocks in [V/m]/[T] with e^{+i w t}.

    Raises:
        SurveyError: a component that is not a real or imaginary part, or a part without its
            partner.
    """
    text = []
    for kind, real in _REAL_PART.items():
        rows = _complex_rows(observations, real)
        if not rows:
            continue
        unit, factor = ("[]", 1.0) if real == Component.TIPPER_REAL else ("[V/m]/[T]", MU_0)
        periods, sites = len({f for f, _, _, _ in rows}), len({r for _, r, _, _ in rows})
        text += [
            f"# {title}",
            "# Period(s) Code GG_Lat GG_Lon X(m) Y(m) Z(m) Component Re Im Error",
        ]
        name = "_".join(word.capitalize() if len(word) > 2 else word for word in kind.split("_"))
        text += [f"> {name}", "> exp(+i\\omega t)", f"> {unit}", "> 0.00", "> 0.000 0.000"]
        text.append(f"> {periods} {sites}")
        for f, r, value, error in rows:
            name = observations.receiver_names[r]
            text.append(
                f"{1 / observations.frequency_hz[f]:.9E} {name} 0.000 0.000 "
                f"0.000 {observations.position_m[r]:.3f} 0.000 {kind[:2]} "
                f"{value.real / factor: .9E} {value.imag / factor: .9E} {error / factor:.9E}"
            )
    Path(path).write_text("\n".join([*text, ""]), encoding="ascii")


def _complex_rows(
    observations: Observations, real: Component
) -> list[tuple[int, int, complex, float]]:
    parts = ({}, {})
    allowed = [part for first in _REAL_PART.values() for part in (first, first + 1)]
    if not np.isin(observations.component, allowed).all():
        raise SurveyError("a ModEM file holds real and imaginary parts, not log10 rho and phase")
    for f, r, c, v, e in zip(
        observations.frequency_index,
        observations.receiver_index,
        observations.component,
        observations.value,
        observations.error,
        strict=True,
    ):
        if c - real in (0, 1):
            parts[c - real][int(f), int(r)] = (v, e)
    if parts[0].keys() != parts[1].keys():
        raise SurveyError(f"{real.name}: some real parts have no imaginary part, or the reverse")
    return [
        (f, r, complex(v, parts[1][f, r][0]), max(e, parts[1][f, r][1]))
        for (f, r), (v, e) in sorted(parts[0].items())
    ]
