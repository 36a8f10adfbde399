"""Read and write OCCAM2MTDATA_1.0 files (deGroot-Hedlin and Constable 1990; Occam2DMT 3.0 manual).

Types: 1 and 5 are log10 rho of TE and TM, 2 and 6 their phases in degrees, 3 and 4 the tipper, 9
and 10 linear rho of TE and TM.
"""

from pathlib import Path

import numpy as np

from plait.errors import SurveyError
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.text_lines import TextLines, read_text_lines

_COMPONENT = {
    1: Component.TE_LOG10_RHO,
    2: Component.TE_PHASE,
    3: Component.TIPPER_REAL,
    4: Component.TIPPER_IMAG,
    5: Component.TM_LOG10_RHO,
    6: Component.TM_PHASE,
    9: Component.TE_LOG10_RHO,
    10: Component.TM_LOG10_RHO,
}
_TYPE = {
    Component.TE_LOG10_RHO: 1,
    Component.TE_PHASE: 2,
    Component.TIPPER_REAL: 3,
    Component.TIPPER_IMAG: 4,
    Component.TM_LOG10_RHO: 5,
    Component.TM_PHASE: 6,
}


def read_occam2d_data(path: str | Path) -> Observations:
    """Read an Occam2D data file; phases become radians, linear rho becomes log10 rho.

    Raises:
        SurveyError: with file and line: another format, an unknown type, a count that does not
            hold, a row that stands twice.
    """
    lines = read_text_lines(path)
    if "OCCAM2MTDATA_1.0" not in lines.line(1).upper():
        lines.fail(1, "expected 'FORMAT: OCCAM2MTDATA_1.0'")
    number, count = _titled(lines, 2, "SITES")
    names = tuple(lines.line(number + row).strip() for row in range(count))
    number, _ = _titled(lines, number + count, "OFFSETS")
    offsets = lines.take(number, count, what="OFFSETS")
    number, count = _titled(lines, offsets.next_line, "FREQUENCIES")
    frequencies = lines.take(number, count, what="FREQUENCIES")
    if (frequencies.values <= 0).any():
        lines.fail(number, "frequencies must be positive")
    number, count = _titled(lines, frequencies.next_line, "DATA BLOCKS")
    rows = _rows(lines, number, count, len(names), len(frequencies.values))
    return Observations(
        frequency_hz=frequencies.values,
        position_m=offsets.values,
        receiver_names=names,
        frequency_index=np.array([row[1] for row in rows]),
        receiver_index=np.array([row[0] for row in rows]),
        component=np.array([int(row[2]) for row in rows]),
        value=np.array([row[3] for row in rows]),
        error=np.array([row[4] for row in rows]),
    )


def _titled(lines: TextLines, number: int, title: str) -> tuple[int, int]:
    """Find the line 'title: count' at or after a line; give the next line and the count (or 0)."""
    for here in range(number, lines.num_lines + 1):
        head, colon, rest = lines.line(here).partition(":")
        if colon and head.strip().upper().startswith(title):
            words = rest.split()
            return here + 1, lines.whole(here, words[0], what=title) if words else 0
    return lines.fail(lines.num_lines, f"no line {title!r}")


def _rows(
    lines: TextLines, number: int, count: int, num_sites: int, num_frequencies: int
) -> list[tuple[int, int, Component, float, float]]:
    rows = []
    seen = set()
    for line in range(number, lines.num_lines + 1):
        words = lines.line(line).split()
        if not words or words[0].upper() == "SITE":
            continue
        if len(words) != 5:
            lines.fail(line, f"a row holds {len(words)} words, expected 5")
        site, frequency, kind = (lines.whole(line, word, what="index") for word in words[:3])
        value, error = (lines.number(line, word, what="datum") for word in words[3:])
        if kind not in _COMPONENT:
            lines.fail(line, f"unknown data type {kind}, expected one of {sorted(_COMPONENT)}")
        if not (1 <= site <= num_sites and 1 <= frequency <= num_frequencies):
            lines.fail(line, f"site {site} or frequency {frequency} is out of range")
        if (site, frequency, kind) in seen:
            lines.fail(line, f"site {site}, frequency {frequency}, type {kind} stand twice")
        seen.add((site, frequency, kind))
        if error <= 0:
            lines.fail(line, f"the error {error} is not positive")
        if kind in (2, 6):
            value, error = np.radians(value), np.radians(error)
        if kind in (9, 10):
            if value <= 0:
                lines.fail(line, f"the resistivity {value} is not positive")
            value, error = np.log10(value), error / (value * np.log(10))
        rows.append((site - 1, frequency - 1, _COMPONENT[kind], float(value), float(error)))
    if len(rows) != count:
        lines.fail(lines.num_lines, f"DATA BLOCKS announces {count} rows and {len(rows)} follow")
    return rows


def write_occam2d_data(path: str | Path, observations: Observations, *, title: str) -> None:
    """Write an Occam2D data file with 9 digits.

    Raises:
        SurveyError: a component that the format does not have (real and imaginary impedances).
    """
    unknown = {Component(int(c)) for c in np.unique(observations.component)} - _TYPE.keys()
    if unknown:
        names = ", ".join(sorted(component.name for component in unknown))
        raise SurveyError(f"Occam2D files do not hold {names}; use as_log_data first")
    text = ["FORMAT:           OCCAM2MTDATA_1.0", f"TITLE:            {title}"]
    text.append(f"SITES:            {len(observations.receiver_names)}")
    text += [f"   {name}" for name in observations.receiver_names]
    text += ["OFFSETS (M):", *(f"   {offset:.3f}" for offset in observations.position_m)]
    text.append(f"FREQUENCIES:      {len(observations.frequency_hz)}")
    text += [f"   {frequency:.9E}" for frequency in observations.frequency_hz]
    text.append(f"DATA BLOCKS:      {observations.num_data}")
    text.append("SITE   FREQ   TYPE   DATUM   ERROR")
    for site, frequency, component, value, error in zip(
        observations.receiver_index,
        observations.frequency_index,
        observations.component,
        observations.value,
        observations.error,
        strict=True,
    ):
        if component in (Component.TE_PHASE, Component.TM_PHASE):
            value, error = np.degrees(value), np.degrees(error)
        kind = _TYPE[Component(int(component))]
        text.append(f"{site + 1:5d} {frequency + 1:5d} {kind:4d} {value: .9E} {error:.9E}")
    Path(path).write_text("\n".join([*text, ""]), encoding="ascii")
