"""Read SEG EDI files in the dialects that surveys hold: impedances, spectra, rho and phase only.

The file is cut into blocks at lines that begin with ">". INFO and comments may hold anything.
Sources: D. E. Wight, "SEG MT/EMAP data interchange standard", rev. 1.0 (1988), and the files
themselves, which bend it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plait.magnetotellurics.edi_spectra import transfer_functions_from_spectra
from plait.magnetotellurics.survey import (
    MU_0,
    NO_VALUE_ABOVE,
    OHM_PER_FIELD_UNIT,
    Station,
    select_frequencies,
)
from plait.magnetotellurics.text_lines import TextLines, read_text_lines

ELEMENTS = (("XX", 0, 0), ("XY", 0, 1), ("YX", 1, 0), ("YY", 1, 1))
_DUMMY_HZ = 999.0
_COUNT = re.compile(r"//\s*(\d+)")
_OPTION = re.compile(r"(\w+)\s*=\s*(\"[^\"]*\"|[^\s=]*)")
_TEXT_BLOCKS = {"INFO", "HEAD", "=DEFINEMEAS", "HMEAS", "EMEAS", "=MTSECT", "=SPECTRASECT"}


@dataclass(frozen=True, kw_only=True)
class Block:
    """One ">NAME ..." line and the lines under it."""

    name: str
    header: str
    first_line: int
    last_line: int


def read_edi(path: str | Path) -> Station:
    """Read one EDI file.

    Impedances are taken as mV/km/nT with e^{+i w t}, as the standard says. Without impedances,
    spectra are turned into transfer functions; without either, rho and phase are.

    Returns:
        A station in SI units; its notes say what was dropped or guessed.

    Raises:
        SurveyError: with file and line: a block whose count is wrong, a word that is not a
            number, no frequencies, neither impedances nor spectra nor rho and phase.
    """
    lines = read_text_lines(path, end_marks=(">END",))
    blocks = _blocks(lines)
    notes: list[str] = []
    header = _head(lines, blocks, notes)
    found: dict[str, Any]
    if any(block.name == "SPECTRA" for block in blocks):
        found = transfer_functions_from_spectra(lines, blocks)
        notes.append("transfer functions were computed from spectra")
    else:
        found = _from_blocks(lines, blocks, header, notes)
    station = Station(**found, **_place(header), notes=tuple(notes), source=lines.path)
    frequency = station.frequency_hz
    # Jones's programs fill absent rows with 999 Hz, and leave numbers in some of their columns.
    dummy = (frequency == _DUMMY_HZ) & (np.min(frequency) < _DUMMY_HZ / 1e4)
    if dummy.any() and frequency[~dummy].max() < _DUMMY_HZ / 10:
        station = select_frequencies(station, ~dummy, why="dummy rows at 999 Hz")
    has_any = station.has_values()
    if not has_any.any():
        lines.fail(lines.num_lines, "no frequency holds a value")
    return select_frequencies(station, has_any, why="no impedance and no tipper there")


def _blocks(lines: TextLines) -> list[Block]:
    starts = [
        number
        for number in range(1, lines.num_lines + 1)
        if lines.line(number).lstrip().startswith(">")
        and not lines.line(number).lstrip().startswith(">!")
    ]
    blocks = []
    for start, after in zip(starts, [*starts[1:], lines.num_lines + 1], strict=True):
        header = lines.line(start).strip()[1:].strip()
        name = header.split()[0].upper() if header else ""
        last = after - 1
        blocks.append(Block(name=name, header=header, first_line=start, last_line=last))
    if not any(block.name == "HEAD" for block in blocks):
        lines.fail(1, "no >HEAD block: this is not an EDI file")
    return blocks


@dataclass(frozen=True, kw_only=True)
class _Header:
    name: str
    latitude_deg: float
    longitude_deg: float
    elevation_m: float
    empty: float


def _options(lines: TextLines, block: Block) -> dict[str, tuple[int, str]]:
    options: dict[str, tuple[int, str]] = {}
    for number in range(block.first_line + 1, block.last_line + 1):
        text = lines.line(number)
        if not text.lstrip().startswith(">") and "=" in text:
            key, _, value = text.partition("=")
            options.setdefault(key.strip().upper(), (number, value.strip().strip('"').strip()))
    return options


def _head(lines: TextLines, blocks: list[Block], notes: list[str]) -> _Header:
    """Take name and place from HEAD, and where it has none from DEFINEMEAS (REFLAT and so on)."""
    options: dict[str, tuple[int, str]] = {}
    for block in blocks:
        if block.name in {"HEAD", "=DEFINEMEAS"}:
            for key, value in _options(lines, block).items():
                if value[1]:
                    options.setdefault(key, value)
    name = options.get("DATAID", (0, ""))[1]
    if not name:
        notes.append("no DATAID: the file name is the station name")
    values = {}
    for field, keys in {
        "latitude_deg": ("LAT", "LATITUDE", "REFLAT"),
        "longitude_deg": ("LONG", "LON", "LONGITUDE", "REFLONG", "REFLON"),
        "elevation_m": ("ELEV", "REFELEV"),
        "empty": ("EMPTY",),
    }.items():
        number, text = next((options[key] for key in keys if key in options), (0, ""))
        values[field] = _degrees(lines, number, text) if text else float("nan")
        if not text and field != "empty":
            notes.append(f"no {field} in the file")
    return _Header(name="_".join((name or lines.path.stem).split()), **values)


def _degrees(lines: TextLines, number: int, text: str) -> float:
    """Read decimal degrees or degrees:minutes:seconds; the sign holds for all three."""
    parts = [
        lines.number(number, part.strip(), what="coordinate or header value")
        for part in text.split(":")
    ]
    if len(parts) > 3 or any(not 0 <= part < 60.000001 for part in parts[1:]):
        lines.fail(number, f"{text!r} is not degrees:minutes:seconds")
    size = sum(abs(part) / 60**power for power, part in enumerate(parts))
    return -size if text.lstrip().startswith("-") else size


def _place(header: _Header) -> dict[str, Any]:
    return {
        "name": header.name,
        "latitude_deg": header.latitude_deg,
        "longitude_deg": header.longitude_deg,
        "elevation_m": header.elevation_m,
    }


def block_values(lines: TextLines, block: Block) -> np.ndarray:
    """Read a data block's numbers and check them against the count after "//"."""
    counted = _COUNT.search(block.header)
    count = int(counted.group(1)) if counted else None
    values: list[float] = []
    for number in range(block.first_line + 1, block.last_line + 1):
        text = lines.line(number)
        if text.lstrip().startswith(">!"):
            continue
        if count is not None and len(values) >= count:
            if text.strip() and not text.strip().startswith("\x1a"):
                # Some Jones files end with rows that belong to no block; see _surplus.
                _surplus(lines, number, text, block, count)
            continue
        values += [lines.number(number, word, what=block.name) for word in text.split()]
    if count is not None and len(values) != count:
        lines.fail(
            block.first_line, f">{block.name} announces {count} numbers and holds {len(values)}"
        )
    return np.array(values)


def _surplus(lines: TextLines, number: int, text: str, block: Block, count: int) -> None:
    message = f">{block.name} announces {count} numbers and more follow: {text.strip()[:40]!r}"
    lines.fail(number, message)


def _from_blocks(
    lines: TextLines, blocks: list[Block], header: _Header, notes: list[str]
) -> dict[str, np.ndarray]:
    data: dict[str, np.ndarray] = {}
    first_line: dict[str, int] = {}
    for block in blocks:
        if block.name in _TEXT_BLOCKS or not _COUNT.search(block.header):
            continue
        if not re.fullmatch(
            r"FREQ|[ZT]ROT(\.EXP)?|RHOROT|(Z|RHO|PHS)[XY]{2}.*|T[XY].*", block.name
        ):
            continue
        if block.name in data:
            lines.fail(
                block.first_line, f">{block.name} stands twice (line {first_line[block.name]})"
            )
        values = block_values(lines, block)
        missing = np.abs(values) > NO_VALUE_ABOVE
        if np.isfinite(header.empty):
            missing |= np.isclose(values, header.empty, rtol=1e-6, atol=0)
        data[block.name] = np.where(missing, np.nan, values)
        first_line[block.name] = block.first_line
    if "FREQ" not in data:
        lines.fail(lines.num_lines, "no >FREQ block")
    num = len(data["FREQ"])
    for name, values in data.items():
        if len(values) != num:
            lines.fail(first_line[name], f">{name} holds {len(values)} numbers, >FREQ {num}")
    return _arrays(lines, data, notes)


def _arrays(
    lines: TextLines, data: dict[str, np.ndarray], notes: list[str]
) -> dict[str, np.ndarray]:
    frequency = data["FREQ"]
    bad = ~(frequency > 0)
    if bad.any():
        lines.fail(1, f">FREQ holds {int(bad.sum())} values that are not positive")
    none = np.full(len(frequency), np.nan)
    z, z_error = _impedance(data, none)
    if not any(f"Z{element}R" in data for element, _, _ in ELEMENTS):
        z, z_error = _from_rho_and_phase(data, frequency, notes)
    tipper = np.stack(
        [_first(data, none, f"T{axis}R") + 1j * _first(data, none, f"T{axis}I") for axis in "XY"],
        -1,
    )
    variance = np.stack([_first(data, none, f"T{axis}VAR", f"T{axis}.VAR") for axis in "XY"], -1)
    parts = [f"Z{element}" for element, _, _ in ELEMENTS] + ["TX", "TY"]
    found = [name for name in parts if any(key.startswith(name) for key in data)]
    for kind in "ZT":
        lost = [name for name in parts if name[0] == kind and name not in found]
        if lost and any(name[0] == kind for name in found):
            notes.append(f"no {', '.join(lost)} in the file")
    has_any = np.isfinite(z).any() or np.isfinite(tipper).any()
    if not has_any:
        lines.fail(lines.num_lines, "no impedance, no rho and phase, no tipper in this file")
    rotation = _first(data, none * 0, "ZROT", "RHOROT")
    negative = (variance < 0).sum() + np.isinf(z_error).sum()
    if negative:
        notes.append(f"{negative} negative variances were dropped")
    return {
        "frequency_hz": frequency,
        "impedance_ohm": z,
        "impedance_error_ohm": np.where(np.isinf(z_error), np.nan, z_error),
        "tipper": tipper,
        "tipper_error": np.sqrt(np.where(variance < 0, np.nan, variance)),
        "rotation_deg": np.where(np.isnan(rotation), 0.0, rotation),
    }


def _first(data: dict[str, np.ndarray], otherwise: np.ndarray, *names: str) -> np.ndarray:
    for name in names:
        for spelling in (name, f"{name}.EXP"):
            if spelling in data:
                return data[spelling]
    return otherwise


def _impedance(data: dict[str, np.ndarray], none: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give Z and its standard deviation in ohm; a negative variance becomes infinity."""
    z = np.full((len(none), 2, 2), np.nan + 0j)
    error = np.full((len(none), 2, 2), np.nan)
    for element, i, j in ELEMENTS:
        real, imag = data.get(f"Z{element}R", none), data.get(f"Z{element}I", none)
        variance = data.get(f"Z{element}.VAR", none)
        z[:, i, j] = np.where(np.isnan(real + imag), np.nan, real + 1j * imag)
        spread = np.sqrt(np.where(variance < 0, np.nan, variance))
        error[:, i, j] = np.where(variance < 0, np.inf, spread)
    return z * OHM_PER_FIELD_UNIT, error * OHM_PER_FIELD_UNIT


def _from_rho_and_phase(
    data: dict[str, np.ndarray], frequency: np.ndarray, notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Z = sqrt(rho w mu_0) e^{i phase}; the error joins those of rho and of the phase."""
    none = np.full(len(frequency), np.nan)
    z = np.full((len(frequency), 2, 2), np.nan + 0j)
    error = np.full((len(frequency), 2, 2), np.nan)
    for element, i, j in ELEMENTS:
        rho, phase = data.get(f"RHO{element}", none), data.get(f"PHS{element}", none)
        if (
            element == "YX"
            and np.nanmedian([*phase, np.nan] if np.isfinite(phase).any() else 0) > 0
        ):
            phase = phase - 180.0
            notes.append(
                "the phase of Zyx was folded into the first quadrant; 180 degrees taken off"
            )
        size = np.sqrt(np.where(rho > 0, rho, np.nan) * 2 * np.pi * frequency * MU_0)
        z[:, i, j] = size * np.exp(1j * np.radians(phase))
        of_rho = data.get(f"RHO{element}.ERR", none) / (2 * rho)
        of_phase = np.radians(data.get(f"PHS{element}.ERR", none))
        error[:, i, j] = size * np.hypot(of_rho, of_phase)
    notes.append("impedances were computed from apparent resistivity and phase")
    return z, error
