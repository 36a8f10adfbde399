"""Every format, cut and spoilt at many places: an error with its place, or right numbers."""

import re
from pathlib import Path

import numpy as np
import pytest

from plait.errors import SurveyError
from plait.magnetotellurics.modem_3d_data import read_modem_3d_data
from plait.magnetotellurics.modem_data import read_modem_data
from plait.magnetotellurics.modem_model import read_modem_model
from plait.magnetotellurics.mt2d_data import read_mt2d_data
from plait.magnetotellurics.occam2d_data import read_occam2d_data
from plait.magnetotellurics.occam2d_model import (
    read_occam2d_iteration,
    read_occam2d_mesh,
    read_occam2d_model,
)
from plait.magnetotellurics.read_station import READERS, read_station

SAMPLES = "mt_metadata_format_samples"
STATIONS = [
    "samtex_kap03/kap103.edi",
    "samtex_kap03/kap112.edi",
    "samtex_misc/CPV001.edi",
    "samtex_misc/bot214.edi",
    "samtex_misc/kap025.edi",
    "gabbs_valley/gv127.edi",
    "paralana_pb/pb23c.edi",
    *(
        f"{SAMPLES}/{name}"
        for name in (
            "tf_edi_cgg.edi",
            "tf_edi_empower.edi",
            "tf_edi_metronix.edi",
            "tf_edi_no_error.edi",
            "tf_edi_phoenix.edi",
            "tf_edi_quantec.edi",
            "tf_edi_rho_only.edi",
            "tf_edi_spectra_in.edi",
            "tf_edi_spectra_out.edi",
            "NMX20.xml",
            "tf_xml_emtf_xml_iris.xml",
            "tf_zmm.zmm",
            "tf_zss_tipper.zss",
            "tf_jfile.j",
            "tf_avg.avg",
            "tf_avg_tipper.avg",
        )
    ),
]
PROFILES = [
    (read_modem_data, "modem2d_block2/de_JT.dat"),
    (read_modem_model, "modem2d_block2/m0.rho"),
    (read_mt2d_data, "coprod2/coprod2data.dat"),
    (read_occam2d_data, "paralana_pb/occam2d/OccamDataFile.dat"),
    (read_occam2d_mesh, "paralana_pb/occam2d/Occam2DMesh"),
    (read_occam2d_model, "paralana_pb/occam2d/Occam2DModel"),
    (read_occam2d_iteration, "paralana_pb/occam2d/ITER12.iter"),
]
JUNK = [
    b"x",
    b">",
    b"/",
    b"//",
    b"\n\n",
    b"nan",
    b"1e999 ",
    b"=",
    b"\0",
    b"\xff\xfe",
    b"-",
    b"<",
    b"&",
]


def read_or_fault(reader, path):
    """Read, or give None for a SurveyError that names file and line; other errors pass."""
    try:
        return reader(path)
    except SurveyError as error:
        # What concerns the whole file, such as "no usable frequency", names the file alone.
        if not re.search(rf"{re.escape(path.name)}(:\d+: | \()", str(error)):
            raise
        return None


def assert_part_of(cut, whole):
    """Each number of a cut file stands in the whole one, at the same frequency."""
    for f, frequency in enumerate(cut.frequency_hz):
        same = np.flatnonzero(np.isclose(whole.frequency_hz, frequency, rtol=1e-9))
        assert len(same) == 1, f"{frequency} Hz is not in the whole file"
        for field in ("impedance_ohm", "impedance_error_ohm", "tipper", "tipper_error"):
            one, other = getattr(cut, field)[f], getattr(whole, field)[same[0]]
            there = np.isfinite(one)
            np.testing.assert_allclose(one[there], other[there], rtol=1e-9, err_msg=field)


@pytest.mark.parametrize("name", STATIONS)
def test_a_station_cut_anywhere_is_an_error_or_a_part_of_the_whole(mt_data, tmp_path, name):
    whole = read_station(mt_data / name)
    data = (mt_data / name).read_bytes()
    path = tmp_path / f"cut{Path(name).suffix}"
    generator = np.random.default_rng(0)
    ends = [i + 1 for i, byte in enumerate(data[:-1]) if byte in b"\r\n"]
    places = [*generator.choice(ends, 6), *generator.integers(0, len(data) - 1, 5)]
    for place in places:
        path.write_bytes(data[:place])
        cut = read_or_fault(read_station, path)
        if cut is not None:
            assert_part_of(cut, whole)


@pytest.mark.parametrize("name", STATIONS)
def test_junk_in_a_station_is_a_survey_error_and_nothing_else(mt_data, tmp_path, name):
    data = (mt_data / name).read_bytes()
    path = tmp_path / f"junk{Path(name).suffix}"
    generator = np.random.default_rng(1)
    for place in generator.integers(0, len(data), 10):
        junk = JUNK[generator.integers(len(JUNK))]
        path.write_bytes(data[:place] + junk + data[place + generator.integers(0, 3) :])
        read_or_fault(read_station, path)


@pytest.mark.parametrize(("reader", "name"), PROFILES, ids=[name for _, name in PROFILES])
def test_junk_in_a_profile_file_is_a_survey_error_and_nothing_else(mt_data, tmp_path, reader, name):
    data = (mt_data / name).read_bytes()
    path = tmp_path / "junk.txt"
    generator = np.random.default_rng(2)
    for place in [*generator.integers(0, len(data), 6), *generator.integers(0, 400, 8)]:
        junk = JUNK[generator.integers(len(JUNK))]
        path.write_bytes(data[:place] + junk + data[place + generator.integers(0, 3) :])
        read_or_fault(reader, path)


@pytest.mark.parametrize("suffix", sorted(READERS))
def test_bytes_of_no_format_are_refused(tmp_path, suffix):
    path = tmp_path / f"noise{suffix}"
    generator = np.random.default_rng(3)
    for size in (1, 100, 5000):
        path.write_bytes(generator.bytes(size))
        assert read_or_fault(read_station, path) is None


@pytest.mark.parametrize("reader", [read for read, _ in PROFILES] + [read_modem_3d_data])
def test_bytes_of_no_profile_format_are_refused(tmp_path, reader):
    path = tmp_path / "noise.txt"
    generator = np.random.default_rng(4)
    for size in (1, 100, 5000):
        path.write_bytes(generator.bytes(size))
        assert read_or_fault(reader, path) is None
