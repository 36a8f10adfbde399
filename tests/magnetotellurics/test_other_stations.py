import numpy as np
import pytest

from plait.errors import SurveyError
from plait.magnetotellurics.axes import to_common_axes
from plait.magnetotellurics.edi import read_edi
from plait.magnetotellurics.read_station import READERS, read_station, read_survey
from plait.magnetotellurics.survey import rotated


@pytest.fixture
def samples(mt_data):
    return mt_data / "mt_metadata_format_samples"


def test_every_sample_of_a_known_format_is_read(samples):
    paths = [path for path in samples.iterdir() if path.suffix in READERS]
    survey = [read_station(path) for path in paths]
    assert len(survey) >= 25


def test_emtf_xml_holds_the_numbers_of_the_file(samples):
    station = read_station(samples / "tf_xml.xml")
    assert station.period_s[0] == pytest.approx(4.654550)
    assert station.impedance_ohm[0, 0, 1] == pytest.approx((3.143284 + 1.101737j) * 4e-4 * np.pi)
    assert station.impedance_error_ohm[0, 0, 1] == pytest.approx(1.790224e-3**0.5 * 4e-4 * np.pi)
    assert station.tipper[0, 1] == pytest.approx(4.601304e-2 + 3.035755e-2j)
    assert station.rotation_deg[0] == 9.1


def test_negative_variances_are_dropped_and_said(samples):
    station = read_station(samples / "tf_xml_no_site_layout.xml")
    assert any("negative variances" in note for note in station.notes)


def test_a_z_file_holds_the_numbers_of_the_file(samples):
    station = read_station(samples / "tf_zmm.zmm")
    assert len(station.frequency_hz) == 38
    assert station.tipper[0, 0] == pytest.approx(0.25870 - 0.18620j)
    assert station.impedance_ohm[0, 0, 1] == pytest.approx((17.27 + 12.72j) * 4e-4 * np.pi)
    # S_yy N_ExEx of the first period: 130.4 * 0.01604.
    error = np.sqrt(130.4 * 1.604e-2) * 4e-4 * np.pi
    assert station.impedance_error_ohm[0, 0, 1] == pytest.approx(error)


def test_the_unit_of_a_j_file_is_the_one_its_resistivities_fit(samples):
    station = read_station(samples / "tf_jfile.j")
    rho = station.apparent_resistivity_ohm_m()
    # RXY of the file at 1.333333 s; its header says S.I. and means mV/km/nT.
    assert rho[0, 0, 1] == pytest.approx(349.3755, rel=1e-3)
    assert any("fit mV/km/nT" in note for note in station.notes)


@pytest.mark.parametrize("name", ["tf_xml.xml", "tf_zmm.zmm", "tf_jfile.j", "tf_zss_tipper.zss"])
def test_a_cut_file_gives_an_error_with_its_line(samples, tmp_path, name):
    data = (samples / name).read_bytes()
    path = tmp_path / f"cut{name[name.rindex('.') :]}"
    for part in np.linspace(0.02, 0.995, 40):
        path.write_bytes(data[: int(len(data) * part)])
        with pytest.raises(SurveyError, match=r"cut\.\w+:\d+: "):
            read_station(path)


def test_an_avg_file_holds_the_numbers_of_the_file(samples):
    station = read_station(samples / "tf_avg.avg")
    assert (station.latitude_deg, station.longitude_deg) == (32.83331167, -107.08305667)
    at = int(np.argmin(np.abs(station.frequency_hz - 0.5)))
    # ARes.mag, Z.phz and ARes.%err of Zxy and Zyx at 0.5 Hz.
    rho, phase = station.apparent_resistivity_ohm_m()[at], station.phase_deg()[at]
    assert rho[0, 1] == pytest.approx(105.65, rel=1e-3)
    assert rho[1, 0] == pytest.approx(13.142, rel=1e-3)
    assert (phase[0, 1], phase[1, 0]) == pytest.approx(np.degrees([0.4821, -2.3297]))
    relative = station.impedance_error_ohm[at, 0, 1] / abs(station.impedance_ohm[at, 0, 1])
    assert relative == pytest.approx(0.0305, rel=1e-6)
    assert station.notes == ("2 values marked as skipped dropped",)


def test_a_tipper_of_an_avg_file_is_dropped_and_said(samples):
    station = read_station(samples / "tf_avg_tipper.avg")
    assert station.rotation_deg[0] == 11.0
    assert "TZX dropped: its unit is not stated" in station.notes


def test_a_magnitude_that_contradicts_its_resistivity_is_an_error(samples, tmp_path):
    text = (samples / "tf_avg.avg").read_text()
    assert "1.6252E+01, 482.1" in text
    (tmp_path / "a.avg").write_text(text.replace("1.6252E+01, 482.1", "1.6252E+04, 482.1"))
    with pytest.raises(SurveyError, match=r"a\.avg:\d+: ARes.mag 105.65 does not fit"):
        read_station(tmp_path / "a.avg")


def test_an_unknown_ending_names_the_known_ones(tmp_path):
    with pytest.raises(SurveyError, match=r"\.edi"):
        read_station(tmp_path / "a.ed")


def test_two_stations_of_one_name_are_refused(samples):
    with pytest.raises(SurveyError, match="given twice"):
        read_survey([samples / "tf_xml.xml", samples / "NMX20.xml"])


def test_turning_forth_and_back_keeps_the_impedance(samples):
    station = read_edi(samples / "tf_edi_cgg.edi")
    back = rotated(rotated(station, x_azimuth_deg=37.0), x_azimuth_deg=0.0)
    finite = np.isfinite(station.impedance_ohm).all((1, 2))
    np.testing.assert_allclose(
        back.impedance_ohm[finite], station.impedance_ohm[finite], rtol=1e-9, atol=1e-12
    )


def test_turning_by_90_degrees_swaps_the_elements(samples):
    station = read_edi(samples / "tf_edi_cgg.edi")
    turned = rotated(station, x_azimuth_deg=90.0)
    whole = np.isfinite(station.impedance_ohm).all((1, 2))
    assert whole.sum() > 60
    np.testing.assert_allclose(
        turned.impedance_ohm[whole, 0, 1], -station.impedance_ohm[whole, 1, 0], atol=1e-12
    )
    np.testing.assert_allclose(turned.tipper[:, 0], station.tipper[:, 1], atol=1e-12)


def test_skewed_channels_are_brought_to_one_pair_of_axes():
    true = np.array([[0.1 + 0.2j, 3 + 3j], [-2 - 2j, 0.3 - 0.1j]])
    angles_h, angles_e = np.radians([10.0, 95.0]), np.radians([20.0, 112.0])
    u_h, u_e = (np.stack([np.cos(a), np.sin(a)], -1) for a in (angles_h, angles_e))
    measured = u_e @ true @ np.linalg.inv(u_h)
    found = to_common_axes(
        measured, output_azimuth_deg=(20.0, 112.0), input_azimuth_deg=(10.0, 95.0)
    )
    c, s = np.cos(angles_h[0]), np.sin(angles_h[0])
    turn = np.array([[c, s], [-s, c]])
    np.testing.assert_allclose(found, turn @ true @ turn.T, rtol=1e-12)
