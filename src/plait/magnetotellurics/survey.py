"""Stations and surveys: transfer functions in SI units, with what was dropped and why.

Readers (edi.py, emtf_xml.py, z_file.py, j_file.py) make a Station; writers and profile.py take it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from plait.errors import SurveyError
from plait.magnetotellurics.arrays import BoolArray, ComplexArray, RealArray

MU_0 = 4e-7 * np.pi  # [H/m]; the value all survey software uses (exact before the SI of 2019)
OHM_PER_FIELD_UNIT = MU_0 * 1e3  # 1 mV/km/nT = 1e3 mu_0 ohm
NO_VALUE_ABOVE = 1e30  # files write 1e32 or 1e33 where there is no value


@dataclass(frozen=True, kw_only=True)
class Station:
    """One sounding; absent values are NaN.

    Attributes:
        name: as written in the file, blanks replaced by "_".
        frequency_hz: (n_freq,), positive.
        impedance_ohm: (n_freq, 2, 2) complex, rows Ex, Ey, columns Hx, Hy.
        impedance_error_ohm: (n_freq, 2, 2), standard deviation, NaN where the file has none.
        tipper: (n_freq, 2) complex, Hz per Hx and Hy.
        tipper_error: (n_freq, 2).
        rotation_deg: (n_freq,), azimuth of the x axis, clockwise from geographic north.
        latitude_deg, longitude_deg, elevation_m: NaN where the file has none.
        notes: what the reader dropped, guessed or converted, one sentence each.
        source: the file.
    """

    name: str
    frequency_hz: RealArray
    impedance_ohm: ComplexArray
    impedance_error_ohm: RealArray
    tipper: ComplexArray
    tipper_error: RealArray
    rotation_deg: RealArray
    latitude_deg: float = float("nan")
    longitude_deg: float = float("nan")
    elevation_m: float = float("nan")
    notes: tuple[str, ...] = ()
    source: Path | None = None

    def __post_init__(self) -> None:
        num = len(self.frequency_hz)
        shapes = {
            "impedance_ohm": (num, 2, 2),
            "impedance_error_ohm": (num, 2, 2),
            "tipper": (num, 2),
            "tipper_error": (num, 2),
            "rotation_deg": (num,),
        }
        for field, shape in shapes.items():
            if getattr(self, field).shape != shape:
                given = getattr(self, field).shape
                raise SurveyError(f"{self._where()}: {field} has shape {given}, expected {shape}")
        if num == 0:
            raise SurveyError(f"{self._where()}: no usable frequency")
        if not (np.isfinite(self.frequency_hz).all() and (self.frequency_hz > 0).all()):
            raise SurveyError(f"{self._where()}: frequencies must be positive and finite")

    def _where(self) -> str:
        return f"{self.source or 'station'} ({self.name})"

    @property
    def period_s(self) -> RealArray:
        """Periods in seconds, (n_freq,)."""
        return 1.0 / self.frequency_hz

    def has_values(self) -> BoolArray:
        """Say where any impedance or tipper element is given, (n_freq,)."""
        z, t = np.isfinite(self.impedance_ohm), np.isfinite(self.tipper)
        return np.asarray(z.any((1, 2)) | t.any(1))

    def apparent_resistivity_ohm_m(self) -> RealArray:
        """Give |Z|^2 / (w mu_0), (n_freq, 2, 2) in ohm m."""
        omega = 2 * np.pi * self.frequency_hz[:, None, None]
        return np.abs(self.impedance_ohm) ** 2 / (omega * MU_0)

    def phase_deg(self) -> RealArray:
        """Give the phase of each impedance element in degrees, (n_freq, 2, 2), -180 to 180."""
        return np.degrees(np.angle(self.impedance_ohm))

    def skew(self) -> RealArray:
        """Give Swift's skew |Zxx + Zyy| / |Zxy - Zyx|, (n_freq,); 0 for a 2-D earth."""
        z = self.impedance_ohm
        return np.abs(z[:, 0, 0] + z[:, 1, 1]) / np.abs(z[:, 0, 1] - z[:, 1, 0])


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Stations of one survey, and a report of what the readers and selections dropped."""

    stations: tuple[Station, ...]
    report: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [station.name for station in self.stations]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SurveyError(f"station names must differ; given twice: {', '.join(twice)}")


def rotated(station: Station, *, x_azimuth_deg: float) -> Station:
    """Turn a station's axes so that x points to x_azimuth_deg, clockwise from north.

    Z' = R Z R^T and T' = T R^T with R = [[c, s], [-s, c]] and the angle from the present x axis.
    Variances are carried as if the elements were independent, so a whole turn back and forth
    does not give the first errors again; rotate once, from the file's values.

    Args:
        station: any station; missing elements make the rotated elements NaN.
        x_azimuth_deg: the wanted azimuth of x, for a 2-D inversion the strike.

    Returns:
        A new station with rotation_deg all equal to x_azimuth_deg.
    """
    angle = np.radians(x_azimuth_deg - station.rotation_deg)
    if (angle == 0).all():
        return station
    turn = np.stack(
        [
            np.stack([np.cos(angle), np.sin(angle)], -1),
            np.stack([-np.sin(angle), np.cos(angle)], -1),
        ],
        axis=-2,
    )
    z_variance = np.einsum("fik,fjl,fkl->fij", turn**2, turn**2, station.impedance_error_ohm**2)
    t_variance = np.einsum("fjl,fl->fj", turn**2, station.tipper_error**2)
    return replace(
        station,
        impedance_ohm=turn @ station.impedance_ohm @ turn.transpose(0, 2, 1),
        impedance_error_ohm=np.sqrt(z_variance),
        tipper=np.einsum("fjl,fl->fj", turn, station.tipper),
        tipper_error=np.sqrt(t_variance),
        rotation_deg=np.full_like(station.rotation_deg, x_azimuth_deg),
    )


def select_frequencies(station: Station, keep: BoolArray, *, why: str) -> Station:
    """Keep the frequencies marked by the boolean array keep, (n_freq,), and note the others."""
    dropped = int((~keep).sum())
    if dropped == 0:
        return station
    return replace(
        station,
        frequency_hz=station.frequency_hz[keep],
        impedance_ohm=station.impedance_ohm[keep],
        impedance_error_ohm=station.impedance_error_ohm[keep],
        tipper=station.tipper[keep],
        tipper_error=station.tipper_error[keep],
        rotation_deg=station.rotation_deg[keep],
        notes=(*station.notes, f"{dropped} of {len(keep)} frequencies dropped: {why}"),
    )
