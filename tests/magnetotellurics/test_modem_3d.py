import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plait.errors import SurveyError
from plait.magnetotellurics.modem_3d_data import (
    Modem3dData,
    read_modem_3d_data,
    write_modem_3d_data,
)
from plait.magnetotellurics.modem_3d_model import (
    Modem3dModel,
    read_modem_3d_model,
    write_modem_3d_model,
)
from plait.magnetotellurics.observations import Component
from plait.magnetotellurics.profile import ProfileSettings
from plait.magnetotellurics.survey import MU_0, Station, Survey
from plait.magnetotellurics.survey_files import read_observations


def two_stations():
    generator = np.random.default_rng(0)
    stations = []
    for name, periods in (("S1", [0.1, 1.0, 10.0]), ("S2", [1.0, 20.0])):
        num = len(periods)
        # Off-diagonal elements in the quadrants of a 2-D earth, so that a profile keeps them.
        size = generator.uniform(0.5, 1.5, (num, 2, 2)) * 1e-2
        angle = np.radians([[10.0, 50.0], [-130.0, -70.0]])
        stations.append(
            Station(
                name=name,
                frequency_hz=1 / np.array(periods),
                impedance_ohm=size * np.exp(1j * angle),
                impedance_error_ohm=np.full((num, 2, 2), 2e-4),
                tipper=generator.standard_normal((num, 2)) + 0.1j,
                tipper_error=np.full((num, 2), 0.02),
                rotation_deg=np.full(num, 30.0),
                latitude_deg=-30.0 - 0.1 * len(stations),
                longitude_deg=21.5,
                elevation_m=-5.0 * len(stations),
            )
        )
    places = np.array([[0.0, 100.0, 0.0], [-11000.0, 250.0, 5.0]])
    return Modem3dData(
        survey=Survey(stations=tuple(stations)), place_m=places, origin_deg=(-30.0, 21.5)
    )


@pytest.fixture
def data_file(tmp_path):
    write_modem_3d_data(tmp_path / "a.dat", two_stations(), title="two stations")
    return tmp_path / "a.dat"


def test_written_data_come_back_with_each_station_keeping_its_own_periods(data_file):
    given_, back = two_stations(), read_modem_3d_data(data_file)
    np.testing.assert_allclose(back.place_m, given_.place_m)
    assert back.origin_deg == (-30.0, 21.5)
    for one, two in zip(given_.survey.stations, back.survey.stations, strict=True):
        assert one.name == two.name
        assert one.latitude_deg == two.latitude_deg
        assert one.elevation_m == two.elevation_m
        for field in ("frequency_hz", "impedance_ohm", "impedance_error_ohm", "tipper",
                      "tipper_error", "rotation_deg"):  # fmt: skip
            np.testing.assert_allclose(getattr(two, field), getattr(one, field), rtol=1e-8)


HAND_WRITTEN = """# by hand
# Period(s) Code GG_Lat GG_Lon X(m) Y(m) Z(m) Component Real Imag Error
> Off_Diagonal_Impedance
> exp(-i\\omega t)
> [mV/km]/[nT]
> 0.00
> 45.0 -110.0
> 1 2
 1.0E+01 A01 0.0 0.0 0.0 -5000.0 0.0 ZXY 2.0 -3.0 0.1
 1.0E+01 A01 0.0 0.0 0.0 -5000.0 0.0 ZYX -2.0 3.0 0.1
 1.0E+01 B02 0.0 0.0 0.0 5000.0 0.0 ZXY 2.0 -3.0 2.0E+15
 1.0E+01 B02 0.0 0.0 0.0 5000.0 0.0 ZYX -4.0 1.0 0.1
# a block that is no transfer function
> Phase_Tensor
> exp(-i\\omega t)
> []
> 0.00
> 45.0 -110.0
> 1 1
 1.0E+01 A01 0.0 0.0 0.0 -5000.0 0.0 PTXX 1.0 0.1
# rho and phase
> Off_Diagonal_Rho_Phase
> exp(-i\\omega t)
> []
> 0.00
> 45.0 -110.0
> 1 1
 5.0E+01 A01 0.0 0.0 0.0 -5000.0 0.0 RHOXY 100.0 10.0
 5.0E+01 A01 0.0 0.0 0.0 -5000.0 0.0 PHSXY 45.0 3.0
"""


def test_signs_units_absent_data_and_left_out_blocks(tmp_path):
    (tmp_path / "a.dat").write_text(HAND_WRITTEN)
    survey = read_modem_3d_data(tmp_path / "a.dat").survey
    first, second = survey.stations
    assert first.impedance_ohm[0, 0, 1] == pytest.approx((2 + 3j) * 1e3 * MU_0)
    assert first.impedance_error_ohm[0, 0, 1] == pytest.approx(0.1e3 * MU_0 * np.sqrt(2))
    assert np.isnan(second.impedance_ohm[0, 0, 1])
    rho = first.apparent_resistivity_ohm_m()
    assert (rho[1, 0, 1], first.phase_deg()[1, 0, 1]) == pytest.approx((100.0, 45.0))
    assert "Phase_Tensor is left out" in survey.report
    assert "B02: 1 data are marked absent or have no partner" in survey.report
    assert any("made from x and y" in note for note in survey.report)


def test_a_3d_file_becomes_a_profile_with_its_distances(tmp_path):
    (tmp_path / "a.dat").write_text(HAND_WRITTEN)
    observations = read_observations(tmp_path / "a.dat", settings=ProfileSettings())
    # From x and y through degrees and back, on spheres that differ by 0.3 %.
    np.testing.assert_allclose(observations.position_m, [0, 10000], rtol=5e-3)
    tm = observations.value[observations.component == Component.TM_LOG10_RHO]
    assert len(tm) == 2
    assert "Phase_Tensor is left out" in observations.notes


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (("Off_Diagonal_Impedance", "Full_Vector"), 3, "unknown data type"),
        (("exp(-i\\omega t)", "exp(x)"), 4, "unknown sign"),
        (("[mV/km]/[nT]", "[V]"), 5, "unknown unit"),
        (("> 1 2", "> 1 3"), 12, "announces 1 periods and 3 sites"),
        (("ZYX -2.0 3.0 0.1", "ZYX -2.0 3.0"), 10, "holds 10 words"),
        (("ZYX -2.0", "ZXY -2.0"), 10, "stand twice"),
        (("ZYX -2.0", "ZZZ -2.0"), 10, "component 'ZZZ'"),
        (("ZXY 2.0 -3.0 0.1", "ZXY 2.0 -3.0 0"), 9, "is not positive"),
        (("-5000.0 0.0 ZYX", "-5001.0 0.0 ZYX"), 10, "two places"),
    ],
)
def test_an_error_names_the_line_and_the_fault(tmp_path, change, line, message):
    assert change[0] in HAND_WRITTEN
    (tmp_path / "a.dat").write_text(HAND_WRITTEN.replace(*change, 1))
    with pytest.raises(SurveyError, match=rf"a\.dat:{line}: .*{message}"):
        read_modem_3d_data(tmp_path / "a.dat")


def model():
    generator = np.random.default_rng(1)
    return Modem3dModel(
        x_width_m=np.array([300.0, 100.0]),
        y_width_m=np.array([10.0, 20.0, 30.0]),
        thickness_m=np.array([1.0, 2.0, 4.0, 8.0]),
        value=generator.uniform(0, 5, (2, 3, 4)),
        scale="LOGE",
        origin_m=(-200.0, -30.0, 0.0),
        rotation_deg=12.5,
    )


def test_a_written_model_comes_back_and_is_cut_at_the_right_cells(tmp_path):
    write_modem_3d_model(tmp_path / "a.rho", model(), title="small")
    back = read_modem_3d_model(tmp_path / "a.rho")
    np.testing.assert_allclose(back.value, model().value, rtol=1e-9)
    np.testing.assert_allclose(back.y_width_m, model().y_width_m)
    assert (back.origin_m, back.rotation_deg) == ((-200.0, -30.0, 0.0), 12.5)
    section = back.section(150.0)
    np.testing.assert_allclose(section.value, model().value[1].T, rtol=1e-9)
    with pytest.raises(SurveyError, match="lies outside -200 to 200"):
        back.section(200.0)


def test_rows_of_a_model_run_from_north_to_south(tmp_path):
    text = "# x\n 2 1 2 0 LINEAR\n5 7\n1\n1 1\n\n 10 20\n\n 30 40\n\n 0 0 0\n 0\n"
    (tmp_path / "a.rho").write_text(text)
    found = read_modem_3d_model(tmp_path / "a.rho")
    np.testing.assert_array_equal(found.value[:, 0, :], [[20, 40], [10, 30]])


def test_a_model_cut_anywhere_is_an_error_with_its_line(tmp_path):
    write_modem_3d_model(tmp_path / "a.rho", model(), title="small")
    whole = (tmp_path / "a.rho").read_bytes()
    for length in range(len(whole) - 1):
        (tmp_path / "cut.rho").write_bytes(whole[:length])
        with pytest.raises(SurveyError, match=r"cut\.rho:\d+: "):
            read_modem_3d_model(tmp_path / "cut.rho")


def test_data_cut_anywhere_are_an_error_with_its_line_or_counted_as_absent(tmp_path, data_file):
    text = data_file.read_text()
    text = text[: text.index("# two", 10)]  # one block alone is a whole file
    known = {s.name: s for s in two_stations().survey.stations}
    shorter = 0
    for length in range(len(text)):
        (tmp_path / "cut.dat").write_text(text[:length])
        try:
            survey = read_modem_3d_data(tmp_path / "cut.dat").survey
        except SurveyError as error:
            if not re.search(r"cut\.dat:\d+: ", str(error)):
                raise
            continue
        shorter += 1
        assert any("of 32 rows are absent" in note for note in survey.report)
        assert "FULL_IMPEDANCE: 12 of 32 rows are absent" not in survey.report
        for station in survey.stations:
            there = np.isfinite(station.impedance_ohm)
            np.testing.assert_allclose(
                station.impedance_ohm[there], known[station.name].impedance_ohm[there], rtol=1e-8
            )
    assert shorter == 3  # whole lines of the last site and period


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=st.integers(0, 1200), junk=st.sampled_from(["x", ">", "#", "\n\n", "1e5 ", "\0", "-"]))
def test_junk_is_a_survey_error_and_nothing_else(tmp_path, where, junk):
    text = HAND_WRITTEN
    where = min(where, len(text))
    (tmp_path / "junk.dat").write_text(text[:where] + junk + text[where:])
    try:
        read_modem_3d_data(tmp_path / "junk.dat")
    except SurveyError as error:
        if "junk.dat" not in str(error):
            raise


def test_stations_in_different_axes_are_not_written(tmp_path):
    data = two_stations()
    first, second = data.survey.stations
    turned = replace(second, rotation_deg=np.zeros(2))
    with pytest.raises(SurveyError, match="one orientation"):
        write_modem_3d_data(
            tmp_path / "a.dat", replace(data, survey=Survey(stations=(first, turned))), title="x"
        )
