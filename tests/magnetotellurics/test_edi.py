import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.errors import SurveyError
from plait.magnetotellurics.edi import read_edi
from plait.magnetotellurics.edi_write import write_edi
from plait.magnetotellurics.survey import MU_0, Station

NAN = float("nan")


def read_or_fault(path):
    """Give the station, or the message of a SurveyError that names the file."""
    try:
        return read_edi(path)
    except SurveyError as error:
        if path.name not in str(error):
            raise
        return str(error)


def half_space_station(*, resistivity_ohm_m=100.0, frequency_hz=(100.0, 1.0, 0.01)):
    frequency = np.array(frequency_hz)
    z = np.sqrt(1j * 2 * np.pi * frequency * MU_0 * resistivity_ohm_m)
    impedance = np.zeros((len(frequency), 2, 2), complex)
    impedance[:, 0, 1], impedance[:, 1, 0] = z, -z
    return Station(
        name="half_space",
        frequency_hz=frequency,
        impedance_ohm=impedance,
        impedance_error_ohm=np.full((len(frequency), 2, 2), 1e-6),
        tipper=np.full((len(frequency), 2), NAN + 0j),
        tipper_error=np.full((len(frequency), 2), NAN),
        rotation_deg=np.zeros(len(frequency)),
        latitude_deg=-32.5,
        longitude_deg=20.25,
        elevation_m=7.0,
    )


def test_a_written_station_comes_back(tmp_path):
    station = half_space_station()
    write_edi(tmp_path / "a.edi", station)
    back = read_edi(tmp_path / "a.edi")
    np.testing.assert_allclose(back.impedance_ohm, station.impedance_ohm, rtol=1e-9)
    np.testing.assert_allclose(back.impedance_error_ohm, station.impedance_error_ohm, rtol=1e-9)
    assert np.isnan(back.tipper).all()
    assert (back.latitude_deg, back.longitude_deg, back.elevation_m) == (-32.5, 20.25, 7.0)


def test_a_half_space_has_its_resistivity_and_45_degrees(tmp_path):
    write_edi(tmp_path / "a.edi", half_space_station())
    back = read_edi(tmp_path / "a.edi")
    np.testing.assert_allclose(back.apparent_resistivity_ohm_m()[:, 0, 1], 100.0, rtol=1e-8)
    np.testing.assert_allclose(back.phase_deg()[:, 0, 1], 45.0, atol=1e-6)
    np.testing.assert_allclose(back.phase_deg()[:, 1, 0], -135.0, atol=1e-6)


def test_every_edi_file_is_read(mt_data):
    paths = sorted(mt_data.rglob("*.edi"))
    assert len(paths) > 80
    for path in paths:
        station = read_edi(path)
        assert len(station.frequency_hz) >= 15, path
        assert np.isfinite(station.impedance_ohm).any() or np.isfinite(station.tipper).any()


def test_all_26_kap03_stations_are_read_with_an_info_line_of_several_equals_signs(mt_data):
    stations = [read_edi(path) for path in sorted((mt_data / "samtex_kap03").glob("*.edi"))]
    assert len(stations) == 26
    first = stations[0]
    assert first.name == "kap103"
    assert first.latitude_deg == pytest.approx(-(32 + 7 / 60 + 48 / 3600))
    # Line 110 of the file: ZXXR at 0.5859374E-04 Hz is 0.1235617E-01 mV/km/nT.
    assert first.frequency_hz[0] == 0.5859374e-04
    assert first.impedance_ohm[0, 0, 0].real == pytest.approx(0.1235617e-01 * 4e-4 * np.pi)


def test_dummy_rows_of_kap109_are_dropped_and_said(mt_data):
    station = read_edi(mt_data / "samtex_kap03" / "kap109.edi")
    assert station.frequency_hz.max() < 1
    assert any("dropped" in note for note in station.notes)


def test_a_missing_tipper_element_is_said(mt_data):
    assert "no TX in the file" in read_edi(mt_data / "samtex_kap03" / "kap112.edi").notes


def test_spectra_give_the_transfer_functions_of_the_converted_file(mt_data):
    folder = mt_data / "mt_metadata_format_samples"
    ours = read_edi(folder / "tf_edi_spectra_in.edi")
    theirs = read_edi(folder / "tf_edi_spectra_out.edi")
    # The file holds six digits.
    np.testing.assert_allclose(ours.impedance_ohm, theirs.impedance_ohm, rtol=1e-6)
    np.testing.assert_allclose(ours.tipper, theirs.tipper, rtol=1e-6)


def test_rho_and_phase_alone_give_impedances_and_say_so(mt_data):
    station = read_edi(mt_data / "mt_metadata_format_samples" / "tf_edi_rho_only.edi")
    rho = station.apparent_resistivity_ohm_m()
    assert rho[0, 0, 1] == pytest.approx(2.818635e-01)
    assert station.phase_deg()[0, 0, 1] == pytest.approx(3.575853e01)
    assert station.phase_deg()[0, 1, 0] == pytest.approx(3.669456e01 - 180)
    assert sum("180 degrees" in note for note in station.notes) == 1


def test_a_file_cut_anywhere_is_an_error_or_has_no_wrong_number(tmp_path):
    station = half_space_station()
    write_edi(tmp_path / "whole.edi", station)
    text = (tmp_path / "whole.edi").read_text()
    for length in range(0, len(text) - 1, 7):
        path = tmp_path / "cut.edi"
        path.write_text(text[:length])
        cut = read_or_fault(path)
        if isinstance(cut, str):
            continue
        rows = np.isfinite(cut.impedance_ohm)
        np.testing.assert_allclose(cut.impedance_ohm[rows], station.impedance_ohm[rows], rtol=1e-9)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    where=st.integers(0, 2000), junk=st.sampled_from(["x", ">", "//", "\n\n", "1e5 ", "=", "\0"])
)
def test_junk_is_a_survey_error_and_nothing_else(tmp_path, where, junk):
    write_edi(tmp_path / "whole.edi", half_space_station())
    text = (tmp_path / "whole.edi").read_text()
    where = min(where, len(text))
    (tmp_path / "junk.edi").write_text(text[:where] + junk + text[where:])
    read_or_fault(tmp_path / "junk.edi")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((">FREQ // 3", ">FREQ // 4"), "announces 4 numbers and holds 3"),
        (("1.000000000E+02", "oops"), "'oops' is not a number"),
        ((">HEAD", ">DEAD"), "no >HEAD"),
        (("LAT=-32.5", "LAT=-32:75:00"), "degrees:minutes:seconds"),
    ],
)
def test_an_error_names_the_line_and_the_fault(tmp_path, change, message):
    write_edi(tmp_path / "a.edi", half_space_station())
    text = (tmp_path / "a.edi").read_text()
    assert change[0] in text
    (tmp_path / "a.edi").write_text(text.replace(*change, 1))
    with pytest.raises(SurveyError, match=r"a\.edi:\d+: ") as caught:
        read_edi(tmp_path / "a.edi")
    assert message in str(caught.value)
