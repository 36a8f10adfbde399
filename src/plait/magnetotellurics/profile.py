"""From a survey to a 2-D data set: strike, distances along the profile, errors, one frequency list.

Rotation follows the strike; distances follow the stations' own line. Projecting stations onto the
normal of an estimated strike would squash the profile, so the two are kept apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from plait.errors import SurveyError, nearest_name
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.survey import MU_0, Station, Survey, rotated

# WGS84: equatorial radius and square of the eccentricity.
_RADIUS_M, _ECCENTRICITY_2 = 6378137.0, 6.69437999014e-3


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A straight line through the stations.

    Attributes:
        azimuth_deg: direction of increasing distance, clockwise from north.
        distance_m: (n_stations,), of each station along the line, 0 at the first one.
        offset_m: (n_stations,), how far each station lies to the right of the line.
    """

    azimuth_deg: float
    distance_m: RealArray
    offset_m: RealArray


def profile_of(survey: Survey, *, strike_deg: float) -> Profile:
    """Lay the best line (least squares of the offsets) through the stations.

    Coordinates are azimuthal equidistant about the mean station, on a sphere of the Gaussian
    radius there [Snyder 1987, USGS Prof. Paper 1395, chapter 25]; distances are right to 0.3 % over
    1500 km.

    Args:
        survey: at least two stations with coordinates.
        strike_deg: x axis of the section; distance increases towards strike + 90 degrees.

    Raises:
        SurveyError: fewer than two stations, no coordinates, all stations at one place.
    """
    places = np.array([[s.latitude_deg, s.longitude_deg] for s in survey.stations])
    if len(places) < 2:
        raise SurveyError("a profile needs at least two stations")
    lost = [
        s.name for s in survey.stations if not np.isfinite([s.latitude_deg, s.longitude_deg]).all()
    ]
    if lost:
        raise SurveyError(f"no coordinates for {', '.join(lost)}")
    north_east = _plane(np.radians(places))
    centred = north_east - north_east.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    if sizes[0] < 1.0:
        raise SurveyError("all stations lie at one place")
    along = directions[0]
    wanted = np.radians(strike_deg + 90)
    if along @ [np.cos(wanted), np.sin(wanted)] < 0:
        along = -along
    distance = centred @ along
    return Profile(
        azimuth_deg=float(np.degrees(np.arctan2(along[1], along[0])) % 360),
        distance_m=distance - distance.min(),
        offset_m=centred @ [-along[1], along[0]],
    )


def _plane(places: RealArray) -> RealArray:
    """Project latitude and longitude, in radians, to metres north and east of their mean."""
    latitude, longitude = places.T
    middle = latitude.mean()
    turn = longitude - np.angle(np.exp(1j * longitude).mean())
    cosine = np.sin(middle) * np.sin(latitude) + np.cos(middle) * np.cos(latitude) * np.cos(turn)
    angle = np.arccos(np.clip(cosine, -1, 1))
    scale = np.where(angle > 1e-9, angle / np.sin(np.maximum(angle, 1e-9)), 1.0)
    north = np.cos(middle) * np.sin(latitude) - np.sin(middle) * np.cos(latitude) * np.cos(turn)
    east = np.cos(latitude) * np.sin(turn)
    root = 1 - _ECCENTRICITY_2 * np.sin(middle) ** 2
    radius = _RADIUS_M * np.sqrt(1 - _ECCENTRICITY_2) / root
    return radius * scale[:, None] * np.stack([north, east], axis=-1)


def swift_strike_deg(stations: Sequence[Station]) -> float:
    """Estimate the strike that leaves least on the diagonals of all impedances [Swift 1967].

    Returns:
        Degrees from north, -45 to 45. The other axis, 90 degrees away, fits as well: geology or the
        tipper has to choose.
    """
    angles = np.arange(-45.0, 45.0, 1.0)
    rest = []
    for angle in angles:
        total = 0.0
        for station in stations:
            z = rotated(station, x_azimuth_deg=float(angle)).impedance_ohm
            z = z[np.isfinite(z).all((1, 2))]
            diagonal = np.abs(z[:, 0, 0]) ** 2 + np.abs(z[:, 1, 1]) ** 2
            total += float(np.sum(diagonal / np.sum(np.abs(z) ** 2, axis=(1, 2))))
        rest.append(total)
    return float(angles[int(np.argmin(rest))])


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """How to make data of a survey.

    Attributes:
        strike_deg: azimuth of x; Zxy in these axes is TE.
        modes: which of "te", "tm", "tipper".
        relative_error_floor: of |Z|; smaller errors are raised, absent ones set to it.
        tipper_error_floor: the same for the tipper, absolute.
        frequency_tolerance: frequencies of different stations closer than this share are one.
        quadrant_slack: phases further outside 0 to 90 degrees than this many errors are dropped;
            a 2-D section does not give them, distortion does. None keeps them.
        stations: names of those to take; none named, all are taken.
    """

    strike_deg: float = 0.0
    modes: tuple[str, ...] = ("te", "tm")
    relative_error_floor: float = 0.05
    tipper_error_floor: float = 0.02
    frequency_tolerance: float = 0.02
    quadrant_slack: float | None = 3.0
    stations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.modes or set(self.modes) - {"te", "tm", "tipper"}:
            raise SurveyError(f"modes={self.modes}: choose from te, tm, tipper")
        if min(self.relative_error_floor, self.tipper_error_floor) <= 0:
            raise SurveyError("error floors must be positive")


def observations_of(survey: Survey, *, settings: ProfileSettings) -> Observations:
    """Rotate, project and merge a survey into log10 rho, phase and tipper data.

    Every station keeps its own frequencies; equal ones (within the tolerance) share an index. The
    notes of the result say what the readers dropped, what is absent, which errors were raised, and
    how far stations lie off the line.

    Raises:
        SurveyError: no coordinates, a station that is not there, or no data left.
    """
    survey = _chosen(survey, settings.stations)
    profile = profile_of(survey, strike_deg=settings.strike_deg)
    order = np.argsort(profile.distance_m)
    stations = [rotated(survey.stations[int(i)], x_azimuth_deg=settings.strike_deg) for i in order]
    frequency = _merged_frequencies(stations, settings.frequency_tolerance)
    farthest = np.abs(profile.offset_m).max()
    notes = [*survey.report, f"stations lie up to {farthest:.0f} m off the line"]
    rows: list[tuple[int, int, int, float, float]] = []
    for receiver, station in enumerate(stations):
        index = [int(np.argmin(np.abs(np.log(frequency / f)))) for f in station.frequency_hz]
        found = _station_rows(station, settings, notes)
        rows += [(index[f], receiver, int(c), v, e) for f, c, v, e in found]
    if not rows:
        raise SurveyError("no station holds a datum of the modes asked for")
    columns = list(zip(*rows, strict=True))
    observations = Observations(
        frequency_hz=frequency,
        position_m=profile.distance_m[order],
        receiver_names=tuple(station.name for station in stations),
        frequency_index=np.array(columns[0]),
        receiver_index=np.array(columns[1]),
        component=np.array(columns[2]),
        value=np.array(columns[3]),
        error=np.array(columns[4]),
    )
    return replace(observations, notes=tuple(notes))


def _chosen(survey: Survey, names: Sequence[str]) -> Survey:
    there = {station.name: station for station in survey.stations}
    for name in names:
        if name not in there:
            raise SurveyError(f"no station {name!r}. {nearest_name(name, there)}")
    return replace(survey, stations=tuple(there[name] for name in names or there))


def _merged_frequencies(stations: list[Station], tolerance: float) -> RealArray:
    """Join frequencies closer than the tolerance to their geometric mean, highest first."""
    every = np.sort(np.concatenate([station.frequency_hz for station in stations]))[::-1]
    groups = [[every[0]]]
    for value in every[1:]:
        if np.log(groups[-1][0] / value) < tolerance:
            groups[-1].append(value)
        else:
            groups.append([value])
    return np.array([np.exp(np.mean(np.log(group))) for group in groups])


def _station_rows(
    station: Station, settings: ProfileSettings, notes: list[str]
) -> list[tuple[int, Component, float, float]]:
    rows: list[tuple[int, Component, float, float]] = []
    omega = 2 * np.pi * station.frequency_hz
    for mode, i, j, sign, rho in (
        ("te", 0, 1, 1.0, Component.TE_LOG10_RHO),
        ("tm", 1, 0, -1.0, Component.TM_LOG10_RHO),
    ):
        if mode not in settings.modes:
            continue
        z = sign * station.impedance_ohm[:, i, j]
        given = station.impedance_error_ohm[:, i, j] / np.abs(z)
        # A complex variance is twice that of each part.
        relative = np.fmax(given / np.sqrt(2), settings.relative_error_floor)
        there = np.isfinite(z) & (np.abs(z) > 0)
        _note(notes, station.name, mode, there, raised=there & (relative > given / np.sqrt(2)))
        if settings.quadrant_slack is not None:
            # By how much the phase leaves the first quadrant, on either side.
            outside = np.abs(np.angle(z * np.exp(-0.25j * np.pi))) - np.pi / 4
            lost = there & (outside > settings.quadrant_slack * relative)
            if lost.any():
                notes.append(f"{station.name}: {int(lost.sum())} {mode} phases out of quadrant")
            there = there & ~lost
        for f in np.flatnonzero(there):
            log_rho = float(np.log10(np.abs(z[f]) ** 2 / (omega[f] * MU_0)))
            error = float(relative[f])
            rows.append((int(f), rho, log_rho, 2 * error / float(np.log(10))))
            rows.append((int(f), Component(rho + 1), float(np.angle(z[f])), error))
    if "tipper" in settings.modes:
        t = station.tipper[:, 1]
        given = station.tipper_error[:, 1] / np.sqrt(2)
        error_of = np.fmax(given, settings.tipper_error_floor)
        there = np.isfinite(t)
        _note(notes, station.name, "tipper", there, raised=there & (error_of > given))
        for f in np.flatnonzero(there):
            error = float(error_of[f])
            rows.append((int(f), Component.TIPPER_REAL, float(t[f].real), error))
            rows.append((int(f), Component.TIPPER_IMAG, float(t[f].imag), error))
    return rows


def _note(notes: list[str], name: str, mode: str, there: np.ndarray, *, raised: np.ndarray) -> None:
    absent = int((~there).sum())
    if absent:
        notes.append(f"{name}: {mode} is absent at {absent} of {len(there)} frequencies")
    if raised.any():
        notes.append(f"{name}: the floor raised {int(raised.sum())} {mode} errors")
