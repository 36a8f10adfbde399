"""Read a station of any known format, and a folder of them."""

from collections.abc import Iterable
from pathlib import Path

from plait.errors import SurveyError, nearest_name
from plait.magnetotellurics.avg_file import read_avg_file
from plait.magnetotellurics.edi import read_edi
from plait.magnetotellurics.emtf_xml import read_emtf_xml
from plait.magnetotellurics.j_file import read_j_file
from plait.magnetotellurics.survey import Station, Survey
from plait.magnetotellurics.z_file import read_z_file

READERS = {
    ".edi": read_edi,
    ".xml": read_emtf_xml,
    ".zmm": read_z_file,
    ".zrr": read_z_file,
    ".zss": read_z_file,
    ".j": read_j_file,
    ".avg": read_avg_file,
}


def read_station(path: str | Path) -> Station:
    """Read one station, by the ending of its file's name.

    Raises:
        SurveyError: an unknown ending, or whatever the format's reader finds.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise SurveyError(f"{path}: unknown ending. {nearest_name(path.suffix.lower(), READERS)}")
    return reader(path)


def read_survey(paths: Iterable[str | Path]) -> Survey:
    """Read several stations; the report repeats each station's notes with its name."""
    stations = tuple(read_station(path) for path in paths)
    report = tuple(f"{station.name}: {note}" for station in stations for note in station.notes)
    return Survey(stations=stations, report=report)
