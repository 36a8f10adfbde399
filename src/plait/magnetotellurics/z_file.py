"""Read Z files of EMTF (.zmm, .zrr, .zss): transfer functions with full error covariance.

Source: G. Egbert, EMTF documentation, "Z-file format"; the samples of mt_metadata.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plait.magnetotellurics.axes import to_common_axes
from plait.magnetotellurics.survey import OHM_PER_FIELD_UNIT, Station
from plait.magnetotellurics.text_lines import TextLines, read_text_lines


@dataclass(frozen=True, kw_only=True)
class _Header:
    name: str
    latitude_deg: float
    longitude_deg: float
    num_channels: int
    num_frequencies: int
    azimuth_deg: dict[str, float]
    names: tuple[str, ...]
    next_line: int


def read_z_file(path: str | Path) -> Station:
    """Read one Z file; channels are turned to common axes with x along Hx.

    The variance of T_ij is S_jj N_ii, with S the inverse coherent signal power matrix and N the
    residual covariance.

    Raises:
        SurveyError: with file and line: a header that does not fit, a block that is too short.
    """
    lines = read_text_lines(path)
    header = _read_header(lines)
    num_out = header.num_channels - 2
    number = header.next_line
    periods, transfers, variances = [], [], []
    for _ in range(header.num_frequencies):
        number = _skip_blank(lines, number)
        found = re.match(r"\s*period\s*:\s*(\S+)", lines.line(number))
        if not found:
            lines.fail(number, "expected a line 'period : ...'")
        periods.append(lines.number(number, found.group(1), what="period"))
        if periods[-1] <= 0:
            lines.fail(number, f"the period {periods[-1]} s is not positive")
        number = _expect(lines, number + 1, "Transfer Functions", allow=1)
        taken = lines.take(number, 4 * num_out, what="transfer functions")
        transfer = taken.values.reshape(num_out, 2, 2)
        number = _expect(lines, taken.next_line, "Inverse Coherent Signal Power")
        signal, number = _triangle(lines, number, 2)
        number = _expect(lines, number, "Residual Covariance")
        residual, number = _triangle(lines, number, num_out)
        transfers.append(transfer[..., 0] + 1j * transfer[..., 1])
        variances.append(np.outer(residual, signal))
    if _skip_blank(lines, number) <= lines.num_lines:
        lines.fail(number, f"more than the announced {header.num_frequencies} frequencies")
    return _station(lines, header, np.array(periods), np.array(transfers), np.array(variances))


def _skip_blank(lines: TextLines, number: int) -> int:
    while number <= lines.num_lines and not lines.line(number).strip():
        number += 1
    return number


def _expect(lines: TextLines, number: int, words: str, *, allow: int = 0) -> int:
    """Give the line after one that holds words; skip at most allow lines before it."""
    for here in range(number, number + allow + 1):
        if words.lower() in lines.line(here).lower():
            return here + 1
    return lines.fail(number, f"expected a line {words!r}")


def _triangle(lines: TextLines, number: int, size: int) -> tuple[np.ndarray, int]:
    """Give the real diagonal of a complex lower triangle, written row by row."""
    taken = lines.take(number, size * (size + 1), what="covariance")
    values = taken.values[0::2]
    diagonal = np.array([values[row * (row + 1) // 2 + row] for row in range(size)])
    return np.maximum(diagonal, 0.0), taken.next_line


def _read_header(lines: TextLines) -> _Header:
    found = {}
    patterns = {
        "place": r"coordinate\s+(\S+)\s+(\S+)",
        "counts": r"number of channels\s+(\d+)\s+number of frequencies\s+(\d+)",
        "name": r"station\s*:\s*(\S+)",
        "channels": r"\s*orientations",
    }
    for number in range(1, min(lines.num_lines, 20) + 1):
        for key, pattern in patterns.items():
            match = re.match(pattern, lines.line(number).strip())
            if match and key not in found:
                found[key] = (number, match)
    for key in ("place", "counts", "channels"):
        if key not in found:
            lines.fail(1, f"no line with the {key} in the first 20 lines: not a Z file")
    number, match = found["counts"]
    num_channels, num_frequencies = int(match.group(1)), int(match.group(2))
    first = found["channels"][0] + 1
    azimuth: dict[str, float] = {}
    names = []
    for here in range(first, first + num_channels):
        words = lines.line(here).split()
        if len(words) < 4:
            lines.fail(here, "expected: channel, azimuth, tilt, station, name")
        names.append(words[-1].lower())
        azimuth[names[-1]] = lines.number(here, words[1], what="azimuth")
    if names[:2] != ["hx", "hy"] or names[2:] not in (["hz"], ["ex", "ey"], ["hz", "ex", "ey"]):
        lines.fail(first, f"channels {names} are not Hx Hy and then Hz, Ex Ey or all three")
    place_line, place = found["place"]
    longitude = lines.number(place_line, place.group(2), what="longitude")
    return _Header(
        name=found["name"][1].group(1) if "name" in found else lines.path.stem,
        latitude_deg=lines.number(place_line, place.group(1), what="latitude"),
        longitude_deg=(longitude + 180) % 360 - 180,
        num_channels=num_channels,
        num_frequencies=num_frequencies,
        azimuth_deg=azimuth,
        names=tuple(names),
        next_line=first + num_channels,
    )


def _station(
    lines: TextLines,
    header: _Header,
    period: np.ndarray,
    transfer: np.ndarray,
    variance: np.ndarray,
) -> Station:
    num = len(period)
    azimuth = header.azimuth_deg
    magnetic = (azimuth["hx"], azimuth["hy"])
    z, z_error = np.full((num, 2, 2), np.nan + 0j), np.full((num, 2, 2), np.nan)
    t, t_error = np.full((num, 1, 2), np.nan + 0j), np.full((num, 1, 2), np.nan)
    outputs = header.names[2:]
    if "hz" in outputs:
        row = outputs.index("hz")
        t = to_common_axes(
            transfer[:, row : row + 1], output_azimuth_deg=(), input_azimuth_deg=magnetic
        )
        t_error = np.sqrt(variance[:, row : row + 1])
    if "ex" in outputs:
        row = outputs.index("ex")
        z = to_common_axes(
            transfer[:, row : row + 2],
            output_azimuth_deg=(azimuth["ex"], azimuth["ey"]),
            input_azimuth_deg=magnetic,
        )
        z_error = np.sqrt(variance[:, row : row + 2])
    return Station(
        name=header.name,
        frequency_hz=1 / period,
        impedance_ohm=z * complex(OHM_PER_FIELD_UNIT),
        impedance_error_ohm=z_error * OHM_PER_FIELD_UNIT,
        tipper=t[:, 0],
        tipper_error=t_error[:, 0],
        rotation_deg=np.full(num, magnetic[0]),
        latitude_deg=header.latitude_deg,
        longitude_deg=header.longitude_deg,
        notes=("no elevation in a Z file",),
        source=lines.path,
    )
