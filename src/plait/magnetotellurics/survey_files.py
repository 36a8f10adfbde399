"""Read a survey to invert, whatever it is: a profile's data file, or a folder of stations."""

from pathlib import Path

from plait.errors import SurveyError
from plait.magnetotellurics.modem_3d_data import MODEM_3D_KINDS, read_modem_3d_data
from plait.magnetotellurics.modem_data import read_modem_data
from plait.magnetotellurics.mt2d_data import read_mt2d_data
from plait.magnetotellurics.observations import Component, Observations, as_log_data
from plait.magnetotellurics.occam2d_data import read_occam2d_data
from plait.magnetotellurics.profile import ProfileSettings, observations_of
from plait.magnetotellurics.read_station import READERS, read_survey

_HEAD_BYTES = 2000


def read_observations(path: str | Path, *, settings: ProfileSettings) -> Observations:
    """Read log10 rho, phase and tipper data of a profile.

    Args:
        path: an MT2DData, Occam2D or ModEM data file, told apart by their first lines; or a
            folder, all of whose station files (EDI, EMTF XML, Z, J) are taken.
        settings: strike, modes and floors of a folder of stations or a ModEM 3-D file, whose
            stations are projected onto their line; a 2-D file has its own.

    Raises:
        SurveyError: nothing that can be read, or whatever the format's reader finds.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in READERS)
        if not files:
            raise SurveyError(f"{path}: no station file in this folder ({', '.join(READERS)})")
        return observations_of(read_survey(files), settings=settings)
    if not path.is_file():
        raise SurveyError(f"{path}: neither a data file nor a folder of stations")
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES).decode("latin-1").upper()
    if "MT2DDATA" in head:
        observations = read_mt2d_data(path)
    elif "OCCAM2MTDATA" in head:
        observations = read_occam2d_data(path)
    elif any(kind in head for kind in MODEM_3D_KINDS):
        return observations_of(read_modem_3d_data(path).survey, settings=settings)
    elif ("IMPEDANCE" in head or "TX_TIPPER" in head) and ">" in head:
        observations = read_modem_data(path)
    else:
        raise SurveyError(
            f"{path}: not an MT2DData, Occam2D or ModEM data file; give a folder of stations "
            "for EDI, EMTF XML, Z or J files"
        )
    is_parts = (observations.component < Component.TIPPER_REAL) & (observations.component % 4 >= 2)
    return as_log_data(observations) if is_parts.any() else observations
