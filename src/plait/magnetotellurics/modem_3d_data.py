"""Read and write ModEM data files for 3-D: impedances, tippers, apparent resistivities and phases.

The form of the blocks is in modem_block.py. A datum's error there is that of its real and of its
imaginary part; a Station's is that of the complex number, larger by the square root of two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plait.errors import SurveyError
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.modem_block import BlockRow, block_starts, read_header, read_rows
from plait.magnetotellurics.survey import MU_0, OHM_PER_FIELD_UNIT, Station, Survey
from plait.magnetotellurics.text_lines import TextLines, read_text_lines

_IMPEDANCE = {"ZXX": (0, 0), "ZXY": (0, 1), "ZYX": (1, 0), "ZYY": (1, 1)}
_TIPPER = {"TX": 0, "TY": 1}
_RHO_PHASE = {"RHOXY": (0, 1), "PHSXY": (0, 1), "RHOYX": (1, 0), "PHSYX": (1, 0)}
_COMPONENTS = {
    "FULL_IMPEDANCE": tuple(_IMPEDANCE),
    "OFF_DIAGONAL_IMPEDANCE": ("ZXY", "ZYX"),
    "FULL_VERTICAL_COMPONENTS": tuple(_TIPPER),
    "OFF_DIAGONAL_RHO_PHASE": tuple(_RHO_PHASE),
}
MODEM_3D_KINDS = tuple(_COMPONENTS)
# Known, but not data of a station of this package; their blocks are left out and noted.
_LEFT_OUT = ("PHASE_TENSOR", "FULL_INTERSTATION_TF")
_NO_VALUE_ERROR = 1e15  # templates give what is absent such an error
_METRES_PER_DEGREE = 6371e3 * np.pi / 180


@dataclass(frozen=True, kw_only=True)
class Modem3dData:
    """A survey and the places of its stations in the coordinates of the model.

    Attributes:
        survey: stations in the order of the file.
        place_m: (n_stations, 3): x (north at orientation 0), y and z.
        origin_deg: latitude and longitude of x = y = 0.
    """

    survey: Survey
    place_m: RealArray
    origin_deg: tuple[float, float]


def read_modem_3d_data(path: str | Path) -> Modem3dData:
    """Read a ModEM 3-D data file into ohm and e^{+i w t}.

    Stations of a file without latitudes and longitudes (all equal) get them from x and y; the
    report says so, and what else was left out.

    Raises:
        SurveyError: with file and line: an unknown data type, unit or sign, a row with the wrong
            number of words, the same datum twice, a site at two places, counts that do not hold.
    """
    lines = read_text_lines(path)
    report: list[str] = []
    rows: list[BlockRow] = []
    origin, orientation = (0.0, 0.0), 0.0
    for number in block_starts(lines):
        if lines.line(number).strip()[1:].strip().upper() in _LEFT_OUT:
            report.append(f"{lines.line(number).strip()[1:].strip()} is left out")
            continue
        header = read_header(lines, number, kinds=_COMPONENTS)
        if rows and (header.origin_deg, header.orientation_deg) != (origin, orientation):
            lines.fail(number + 3, "another orientation or origin than the first block's")
        origin, orientation = header.origin_deg, header.orientation_deg
        is_complex = header.kind != "OFF_DIAGONAL_RHO_PHASE"
        block, _ = read_rows(lines, header, is_complex=is_complex)
        for row in block:
            if row.component not in _COMPONENTS[header.kind]:
                expected = ", ".join(_COMPONENTS[header.kind])
                lines.fail(row.line, f"component {row.component!r}, expected {expected}")
        rows += block
        full = header.num_periods * header.num_sites * len(_COMPONENTS[header.kind])
        if len(block) < full:
            report.append(f"{header.kind}: {full - len(block)} of {full} rows are absent")
    if not rows:
        lines.fail(lines.num_lines, "no data rows")
    return _gathered(lines, rows, origin, orientation, report)


def _gathered(
    lines: TextLines,
    rows: list[BlockRow],
    origin: tuple[float, float],
    orientation: float,
    report: list[str],
) -> Modem3dData:
    by_site: dict[str, list[BlockRow]] = {}
    for row in rows:
        mine = by_site.setdefault(row.site, [])
        mine.append(row)
        if row.place_m != mine[0].place_m:
            lines.fail(row.line, f"site {row.site} stands at two places")
    places = np.array([mine[0].place_m for mine in by_site.values()])
    degrees = np.array([(mine[0].latitude_deg, mine[0].longitude_deg) for mine in by_site.values()])
    if len(degrees) > 1 and (degrees == degrees[0]).all():
        report.append("latitudes and longitudes are absent; made from x and y about the origin")
        angle = np.radians(orientation)
        north = places[:, 0] * np.cos(angle) - places[:, 1] * np.sin(angle)
        east = places[:, 0] * np.sin(angle) + places[:, 1] * np.cos(angle)
        latitude = origin[0] + north / _METRES_PER_DEGREE
        scale = _METRES_PER_DEGREE * np.cos(np.radians(origin[0]))
        degrees = np.column_stack([latitude, origin[1] + east / scale])
    stations = tuple(
        _station(lines, name, mine, degrees[i], places[i, 2], orientation)
        for i, (name, mine) in enumerate(by_site.items())
    )
    report += [f"{station.name}: {note}" for station in stations for note in station.notes]
    return Modem3dData(
        survey=Survey(stations=stations, report=tuple(report)), place_m=places, origin_deg=origin
    )


def _station(
    lines: TextLines,
    name: str,
    rows: Sequence[BlockRow],
    degrees: RealArray,
    z_m: float,
    orientation: float,
) -> Station:
    periods = sorted({row.period_s for row in rows})
    index = {period: f for f, period in enumerate(periods)}
    num = len(periods)
    z, t = np.full((num, 2, 2), np.nan + 0j), np.full((num, 2), np.nan + 0j)
    z_error, t_error = np.full((num, 2, 2), np.nan), np.full((num, 2), np.nan)
    rho_phase: dict[tuple[int, str], BlockRow] = {}
    absent = 0
    for row in rows:
        f = index[row.period_s]
        if row.error >= _NO_VALUE_ERROR * MU_0:
            absent += 1
        elif row.component in _IMPEDANCE:
            z[(f, *_IMPEDANCE[row.component])] = row.value
            z_error[(f, *_IMPEDANCE[row.component])] = row.error * np.sqrt(2)
        elif row.component in _TIPPER:
            t[f, _TIPPER[row.component]] = row.value
            t_error[f, _TIPPER[row.component]] = row.error * np.sqrt(2)
        else:
            rho_phase[f, row.component] = row
    for (f, component), row in rho_phase.items():
        if component.startswith("PHS"):
            continue
        partner = rho_phase.get((f, component.replace("RHO", "PHS")))
        if partner is None:
            absent += 1
            continue
        if row.value.real <= 0:
            lines.fail(row.line, f"the apparent resistivity {row.value.real:g} is not positive")
        omega = 2 * np.pi / row.period_s
        size = np.sqrt(row.value.real * omega * MU_0)
        phase = np.radians(partner.value.real)
        where = (f, *_RHO_PHASE[component])
        z[where] = size * np.exp(1j * phase)
        # |dZ| / |Z| = d rho / (2 rho), of each part.
        z_error[where] = size * row.error / (2 * row.value.real) * np.sqrt(2)
    return Station(
        name=name,
        frequency_hz=1 / np.array(periods),
        impedance_ohm=z,
        impedance_error_ohm=z_error,
        tipper=t,
        tipper_error=t_error,
        rotation_deg=np.full(num, orientation),
        latitude_deg=float(degrees[0]),
        longitude_deg=float(degrees[1]),
        elevation_m=-float(z_m),
        notes=(f"{absent} data are marked absent or have no partner",) if absent else (),
        source=lines.path,
    )


def write_modem_3d_data(path: str | Path, data: Modem3dData, *, title: str) -> None:
    """Write impedances in [mV/km]/[nT] and tippers as ModEM 3-D blocks with e^{+i w t}.

    Raises:
        SurveyError: stations in different axes, a blank in a name, values without an error.
    """
    stations = data.survey.stations
    angles = {float(angle) for station in stations for angle in station.rotation_deg}
    if len(angles) != 1:
        raise SurveyError("a ModEM file has one orientation; bring all stations to it by rotated()")
    if any(len(station.name.split()) != 1 for station in stations):
        raise SurveyError("names in a ModEM file are single words")
    text: list[str] = []
    for kind, unit, names in (
        ("Full_Impedance", "[mV/km]/[nT]", _IMPEDANCE),
        ("Full_Vertical_Components", "[]", _TIPPER),
    ):
        rows: list[str] = []
        periods: set[str] = set()
        sites: set[str] = set()
        for station, place in zip(stations, data.place_m, strict=True):
            for line, period in _written_rows(station, place, names):
                rows.append(line)
                periods.add(period)
                sites.add(station.name)
        if not rows:
            continue
        text += [
            f"# {title}",
            "# Period(s) Code GG_Lat GG_Lon X(m) Y(m) Z(m) Component Re Im Error",
            f"> {kind}",
            "> exp(+i\\omega t)",
            f"> {unit}",
            f"> {angles.copy().pop():.4f}",
            f"> {data.origin_deg[0]:.6f} {data.origin_deg[1]:.6f}",
            f"> {len(periods)} {len(sites)}",
            *rows,
        ]
    Path(path).write_text("\n".join([*text, ""]), encoding="utf-8")


def _written_rows(
    station: Station, place: RealArray, names: dict[str, tuple[int, int]] | dict[str, int]
) -> list[tuple[str, str]]:
    is_impedance = names is _IMPEDANCE
    values = station.impedance_ohm / OHM_PER_FIELD_UNIT if is_impedance else station.tipper
    errors = station.impedance_error_ohm / OHM_PER_FIELD_UNIT if is_impedance else None
    errors = station.tipper_error if errors is None else errors
    found = []
    for f, frequency in enumerate(station.frequency_hz):
        period = f"{1 / frequency:.9E}"
        for name, where in names.items():
            value, error = values[f][where], errors[f][where] / np.sqrt(2)
            if not np.isfinite(value):
                continue
            if not error > 0:
                raise SurveyError(f"{station.name}: {name} at {period} s has no error")
            found.append(
                (
                    f"{period} {station.name} {station.latitude_deg:.6f} "
                    f"{station.longitude_deg:.6f} {place[0]:.3f} {place[1]:.3f} {place[2]:.3f} "
                    f"{name} {value.real: .9E} {value.imag: .9E} {error:.9E}",
                    period,
                )
            )
    return found
