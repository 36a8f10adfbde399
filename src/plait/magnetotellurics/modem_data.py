"""Read and write ModEM data files for 2-D: TE and TM impedances and the TE tipper.

The form of the blocks is in modem_block.py; 3-D files are read by modem_3d_data.py.
"""

from pathlib import Path

import numpy as np

from plait.errors import SurveyError
from plait.magnetotellurics.impedance_table import ImpedanceTable
from plait.magnetotellurics.modem_block import block_starts, read_header, read_rows
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.survey import MU_0
from plait.magnetotellurics.text_lines import read_text_lines

_REAL_PART = {
    "TE_IMPEDANCE": Component.TE_REAL,
    "TM_IMPEDANCE": Component.TM_REAL,
    "TX_TIPPER": Component.TIPPER_REAL,
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
    end = 1
    for number in block_starts(lines):
        header = read_header(lines, number, kinds=_REAL_PART)
        rows, end = read_rows(lines, header, is_complex=True)
        for row in rows:
            table.add(
                frequency_hz=1 / row.period_s,
                name=row.site,
                position_m=row.place_m[1],
                real=_REAL_PART[header.kind],
                value=row.value,
                error=row.error,
            )
        full = header.num_periods * header.num_sites
        if len(rows) > full:
            lines.fail(end - 1, f"{header.kind}: {len(rows)} rows, expected at most {full}")
        if len(rows) < full:
            notes.append(f"{header.kind}: {full - len(rows)} of {full} rows are absent")
    if not table.rows:
        lines.fail(lines.num_lines, "no data rows")
    return table.observations(tuple(notes))


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
