"""Transfer functions from the SPECTRA blocks of an EDI file.

A block holds an n x n real matrix: powers on the diagonal, the real parts of the cross powers
below it and their imaginary parts above it (SEG standard, section on spectra).
"""

import re
from typing import TYPE_CHECKING

import numpy as np

from plait.magnetotellurics.survey import NO_VALUE_ABOVE, OHM_PER_FIELD_UNIT
from plait.magnetotellurics.text_lines import TextLines

if TYPE_CHECKING:
    from plait.magnetotellurics.edi import Block

_COUNT = re.compile(r"//\s*(\d+)")
_WORD = re.compile(r"(\w+)\s*=\s*([^\s=]+)")


def transfer_functions_from_spectra(
    lines: TextLines, blocks: "list[Block]"
) -> dict[str, np.ndarray]:
    """Compute Z and T with the remote reference, where the file names one.

    Z = <E R*> <H R*>^-1 and T = <Hz R*> <H R*>^-1 with R the remote (or else the local) magnetic
    channels [Gamble et al. 1979, eq. 6]. With <r_i r_i*> the power of the residual of output i,
    var Z_ij = <r_i r_i*> [<H R*>^-1 <R R*> <R H*>^-1]_jj / (AVGT - 2), AVGT the number of averaged
    estimates [the same paper, sec. on errors].

    Returns:
        The arrays of a Station, impedances in ohm.
    """
    channels = _channels(lines, blocks)
    rows = []
    for block in blocks:
        if block.name == "SPECTRA":
            rows.append(_one_frequency(lines, block, channels))
    keys = rows[0].keys()
    return {key: np.stack([row[key] for row in rows]) for key in keys}


def _channels(lines: TextLines, blocks: "list[Block]") -> list[str]:
    """Name the channels in the order of the matrix; the second HX and HY are the remote ones."""
    kind_of: dict[str, str] = {}
    section = None
    for block in blocks:
        words = dict(_WORD.findall(block.header.upper()))
        if block.name in {"HMEAS", "EMEAS"} and {"ID", "CHTYPE"} <= words.keys():
            kind_of[_same_id(words["ID"])] = words["CHTYPE"]
        if block.name == "=SPECTRASECT":
            section = block
    if section is None:
        lines.fail(lines.num_lines, ">SPECTRA without >=SPECTRASECT")
    kinds: list[str] = []
    wanted = None
    for number in range(section.first_line + 1, section.last_line + 1):
        text = lines.line(number).strip()
        counted = _COUNT.search(text)
        if counted:
            wanted = int(counted.group(1))
            continue
        if wanted is not None and len(kinds) < wanted:
            for word in text.split():
                if _same_id(word) not in kind_of:
                    lines.fail(number, f"channel {word} has no HMEAS or EMEAS line")
                kinds.append(kind_of[_same_id(word)])
    if wanted is None or len(kinds) != wanted:
        lines.fail(
            section.first_line, f"the list of channels holds {len(kinds)}, expected {wanted}"
        )
    names: list[str] = []
    for kind in kinds:
        name = kind.replace("RRH", "RH")
        if name in names:
            # A repeated magnetic channel is the reference; one file names both of them HY.
            name = "RHX" if "RHX" not in names and "RX" not in names else "RHY"
        names.append({"RX": "RHX", "RY": "RHY"}.get(name, name))
    missing = {"HX", "HY", "EX", "EY"} - set(names)
    if missing:
        lines.fail(section.first_line, f"no channel {', '.join(sorted(missing))}")
    return names


def _same_id(word: str) -> str:
    return word.lstrip("0") or "0"


def _one_frequency(lines: TextLines, block: "Block", names: list[str]) -> dict[str, np.ndarray]:
    num = len(names)
    words = dict(_WORD.findall(block.header.upper()))
    line = block.first_line
    if "FREQ" not in words:
        lines.fail(line, ">SPECTRA without FREQ")
    frequency = lines.number(line, words["FREQ"], what="FREQ")
    values = [
        lines.number(number, word, what="SPECTRA")
        for number in range(line + 1, block.last_line + 1)
        if not lines.line(number).lstrip().startswith(">!")
        for word in lines.line(number).split()
    ]
    counted = _COUNT.search(block.header)
    if len(values) != num * num or (counted and int(counted.group(1)) != num * num):
        lines.fail(line, f">SPECTRA holds {len(values)} numbers, expected {num * num}")
    matrix = np.array(values).reshape(num, num)
    lower = np.tril(matrix, -1) + 1j * np.triu(matrix, 1).T
    power = lower + lower.conj().T + np.diag(np.diag(matrix))
    averages = lines.number(line, words.get("AVGT", "nan").replace("NAN", "0"), what="AVGT")
    found = _solve(power, names, averages)
    rotation = lines.number(line, words.get("ROTSPEC", "0"), what="ROTSPEC")
    empty = np.abs(matrix).max() > NO_VALUE_ABOVE
    if empty:
        found = {key: np.full_like(value, np.nan) for key, value in found.items()}
    return {"frequency_hz": np.array(frequency), "rotation_deg": np.array(rotation), **found}


def _solve(power: np.ndarray, names: list[str], averages: float) -> dict[str, np.ndarray]:
    def rows(*wanted: str) -> list[int]:
        return [names.index(name) for name in wanted]

    local = rows("HX", "HY")
    remote = rows("RHX", "RHY") if {"RHX", "RHY"} <= set(names) else local
    inverse = np.linalg.inv(power[np.ix_(local, remote)])
    spread = np.real(np.diag(inverse.conj().T @ power[np.ix_(remote, remote)] @ inverse))
    freedom = max(averages - 2.0, 0.0)

    def transfer(outputs: list[int]) -> tuple[np.ndarray, np.ndarray]:
        found = power[np.ix_(outputs, remote)] @ inverse
        cross = power[np.ix_(outputs, local)]
        residual = np.real(
            np.diag(power[np.ix_(outputs, outputs)])
            - 2 * np.real(np.einsum("ij,ij->i", found.conj(), cross))
            + np.einsum("ij,jk,ik->i", found, power[np.ix_(local, local)], found.conj())
        )
        variance = np.outer(np.maximum(residual, 0.0), spread)
        return found, np.sqrt(variance / freedom) if freedom else np.full_like(variance, np.nan)

    impedance, impedance_error = transfer(rows("EX", "EY"))
    tipper, tipper_error = np.full((1, 2), np.nan + 0j), np.full((1, 2), np.nan)
    if "HZ" in names:
        tipper, tipper_error = transfer(rows("HZ"))
    return {
        "impedance_ohm": impedance * OHM_PER_FIELD_UNIT,
        "impedance_error_ohm": impedance_error * OHM_PER_FIELD_UNIT,
        "tipper": tipper[0],
        "tipper_error": tipper_error[0],
    }
