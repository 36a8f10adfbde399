"""Which data of a survey an inversion takes: frequencies, stations, and single points by a file.

What is left out is counted in the notes of the observations, and stands in the report.
"""

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from plait.errors import SurveyError, nearest_name
from plait.magnetotellurics.arrays import BoolArray, IndexArray
from plait.magnetotellurics.observations import Component, Observations, masked

_COLUMNS = ("station", "component", "min_frequency_hz", "max_frequency_hz")
_ANY = "*"


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    """Data to take; the defaults take all.

    Attributes:
        min_frequency_hz, max_frequency_hz: data outside are left out; None sets no limit.
        stations_left_out: names.
        left_out: None, or a file of comma-separated lines "station,component,min_frequency_hz,
            max_frequency_hz", of data that are left out. "*" stands for every station or component;
            components are the names of Component or its first part (TE, TM, TIPPER).
    """

    min_frequency_hz: float | None = None
    max_frequency_hz: float | None = None
    stations_left_out: tuple[str, ...] = ()
    left_out: str | None = None

    def __post_init__(self) -> None:
        low, high = self.limits_hz
        if not 0 <= low <= high:
            raise SurveyError("need 0 <= min_frequency_hz <= max_frequency_hz")

    @property
    def limits_hz(self) -> tuple[float, float]:
        """The lowest and the highest frequency, 0 and infinity where there is no limit."""
        low, high = self.min_frequency_hz, self.max_frequency_hz
        return 0.0 if low is None else low, math.inf if high is None else high


def chosen_data(observations: Observations, choice: DataChoice) -> Observations:
    """Leave out what the choice does not take, and frequencies and stations without data.

    Raises:
        SurveyError: an unknown station or component, a file that cannot be read, no data left.
    """
    frequency = observations.frequency_hz[observations.frequency_index]
    low, high = choice.limits_hz
    reasons = [((frequency >= low) & (frequency <= high), "their frequency")]
    for name in choice.stations_left_out:
        away = observations.receiver_index == _station(observations, name, "stations_left_out")
        reasons.append((~away, f"station {name}"))
    if choice.left_out is not None:
        away = _marked(observations, Path(choice.left_out))
        reasons.append((~away, f"named in {Path(choice.left_out).name}"))
    everything = np.logical_and.reduce([keep for keep, _ in reasons])
    if everything.all():
        return observations
    if not everything.any():
        raise SurveyError("the choice of data leaves none")
    why = ", ".join(text for keep, text in reasons if not keep.all())
    return _compact(masked(observations, everything, why=why))


def _compact(observations: Observations) -> Observations:
    """Leave out frequencies and receivers without data, which would be computed for nothing."""
    frequencies, f = np.unique(observations.frequency_index, return_inverse=True)
    receivers, r = np.unique(observations.receiver_index, return_inverse=True)
    return replace(
        observations,
        frequency_hz=observations.frequency_hz[frequencies],
        position_m=observations.position_m[receivers],
        receiver_names=tuple(observations.receiver_names[i] for i in receivers),
        frequency_index=f,
        receiver_index=r,
    )


def _station(observations: Observations, name: str, where: str) -> int:
    names = observations.receiver_names
    if name not in names:
        raise SurveyError(f"{where}: no station {name!r}. {nearest_name(name, names)}")
    return names.index(name)


def _marked(observations: Observations, path: Path) -> BoolArray:
    """Mark the data that a file names, (n_data,)."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SurveyError(f"{path}: cannot be read: {error}") from error
    frequency = observations.frequency_hz[observations.frequency_index]
    marked = np.zeros(observations.num_data, dtype=bool)
    for number, row in enumerate(csv.reader(lines, skipinitialspace=True), start=1):
        where = f"{path}:{number}"
        if not row or row[0].startswith("#") or tuple(row) == _COLUMNS:
            continue
        if len(row) != len(_COLUMNS):
            raise SurveyError(f"{where}: expected {','.join(_COLUMNS)}; got {len(row)} values")
        low, high = (_number(text, where) for text in row[2:])
        here = (frequency >= low) & (frequency <= high)
        if row[0] != _ANY:
            here &= observations.receiver_index == _station(observations, row[0], where)
        here &= np.isin(observations.component, _components(row[1], where))
        marked |= here
    return marked


def _components(name: str, where: str) -> IndexArray:
    """Give the components that a name or the first part of names means."""
    wanted = name.strip().upper()
    found = [c for c in Component if wanted in (_ANY, c.name, c.name.split("_")[0])]
    if not found:
        known = ["TE", "TM", "TIPPER", *(c.name for c in Component)]
        raise SurveyError(f"{where}: no component {name!r}. {nearest_name(wanted, known)}")
    return np.array(found)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise SurveyError(f"{where}: expected a frequency in Hz, got {text!r}")
    return value
