import numpy as np
import pytest

from plait.errors import SurveyError
from plait.magnetotellurics.observations import Component
from plait.magnetotellurics.occam2d_data import read_occam2d_data
from plait.magnetotellurics.profile import (
    ProfileSettings,
    observations_of,
    profile_of,
    swift_strike_deg,
)
from plait.magnetotellurics.read_station import read_survey
from plait.magnetotellurics.survey import Station, Survey, rotated

NAN = float("nan")


def station(name, latitude, longitude, *, frequency_hz=(10.0, 1.0)):
    frequency = np.array(frequency_hz)
    impedance = np.zeros((len(frequency), 2, 2), complex)
    impedance[:, 0, 1], impedance[:, 1, 0] = 1e-2 * (1 + 1j), -2e-2 * (1 + 1j)
    return Station(
        name=name,
        frequency_hz=frequency,
        impedance_ohm=impedance,
        impedance_error_ohm=np.full((len(frequency), 2, 2), NAN),
        tipper=np.full((len(frequency), 2), NAN + 0j),
        tipper_error=np.full((len(frequency), 2), NAN),
        rotation_deg=np.zeros(len(frequency)),
        latitude_deg=latitude,
        longitude_deg=longitude,
    )


def test_one_degree_along_a_meridian_is_110_6_km_at_the_equator():
    """WGS84: 110.574 km per degree of latitude at the equator; a sphere gives it to 0.4 %."""
    survey = Survey(stations=(station("a", -0.5, 20.0), station("b", 0.5, 20.0)))
    profile = profile_of(survey, strike_deg=-90.0)
    assert profile.distance_m[1] == pytest.approx(110574, rel=4e-3)
    assert profile.azimuth_deg % 360 == pytest.approx(0, abs=1e-6)


def test_distance_increases_to_the_right_of_the_strike():
    stations = (station("west", -30.0, 139.0), station("east", -30.0, 139.2))
    survey = Survey(stations=stations)
    assert profile_of(survey, strike_deg=10.0).distance_m[0] == 0
    assert profile_of(survey, strike_deg=190.0).distance_m[1] == 0


def test_the_strike_does_not_squash_the_profile():
    survey = Survey(stations=(station("a", -30.0, 139.0), station("b", -30.1, 139.2)))
    lengths = [np.ptp(profile_of(survey, strike_deg=s).distance_m) for s in (-20.0, 0.0, 30.0)]
    np.testing.assert_allclose(lengths, lengths[0])


def test_paralana_distances_are_those_of_its_occam_file(mt_data):
    survey = read_survey(sorted((mt_data / "paralana_pb").glob("*.edi")))
    observations = observations_of(survey, settings=ProfileSettings(strike_deg=7.0))
    theirs = read_occam2d_data(mt_data / "paralana_pb" / "occam2d" / "OccamDataFile.dat")
    assert observations.receiver_names == theirs.receiver_names
    # Theirs come from another projection onto an azimuth rounded to a degree.
    np.testing.assert_allclose(observations.position_m, theirs.position_m, atol=60)


def test_kap03_is_1440_km_long_and_reports_what_is_absent(mt_data):
    survey = read_survey(sorted((mt_data / "samtex_kap03").glob("*.edi")))
    observations = observations_of(
        survey, settings=ProfileSettings(strike_deg=-45.0, modes=("te", "tm", "tipper"))
    )
    assert np.ptp(observations.position_m) == pytest.approx(1.444e6, rel=0.01)
    assert any("kap112: tipper is absent at 20 of 20" in note for note in observations.notes)
    assert (observations.error > 0).all()


def test_stations_keep_their_own_periods_and_near_ones_are_one():
    survey = Survey(
        stations=(
            station("a", 0.0, 0.0, frequency_hz=(10.0, 1.0)),
            station("b", 0.0, 0.1, frequency_hz=(10.05, 0.1)),
        )
    )
    observations = observations_of(survey, settings=ProfileSettings(modes=("te",)))
    assert len(observations.frequency_hz) == 3
    at_b = observations.frequency_index[observations.receiver_index == 1]
    assert sorted(set(at_b)) == [0, 2]


def test_modes_take_their_elements_and_absent_errors_take_the_floor():
    survey = Survey(stations=(station("a", 0.0, 0.0), station("b", 0.0, 0.1)))
    observations = observations_of(survey, settings=ProfileSettings(relative_error_floor=0.03))
    te = observations.value[observations.component == Component.TE_LOG10_RHO]
    tm = observations.value[observations.component == Component.TM_LOG10_RHO]
    np.testing.assert_allclose(tm - te, np.log10(4.0))
    phase = observations.component == Component.TM_PHASE
    np.testing.assert_allclose(observations.value[phase], np.pi / 4)
    np.testing.assert_allclose(observations.error[phase], 0.03)


def test_phases_that_no_section_gives_are_dropped_and_said():
    odd = station("odd", 0.0, 0.1)
    odd.impedance_ohm[1, 1, 0] *= -1
    survey = Survey(stations=(station("a", 0.0, 0.0), odd))
    observations = observations_of(survey, settings=ProfileSettings())
    assert observations.num_data == 2 * 2 * 4 - 2
    assert "odd: 1 tm phases out of quadrant" in observations.notes
    kept = observations_of(survey, settings=ProfileSettings(quadrant_slack=None))
    assert kept.num_data == 2 * 2 * 4


def test_the_swift_strike_of_a_turned_2d_impedance_is_found():
    turned = rotated(station("a", 0.0, 0.0), x_azimuth_deg=-30.0)
    assert swift_strike_deg([turned]) == pytest.approx(0.0)


def test_stations_without_coordinates_are_named():
    survey = Survey(stations=(station("a", 0.0, 0.0), station("lost", NAN, 0.1)))
    with pytest.raises(SurveyError, match="lost"):
        profile_of(survey, strike_deg=0.0)


def test_named_stations_alone_make_the_profile_and_an_unknown_one_is_refused():
    survey = Survey(stations=tuple(station(name, 0.0, i) for i, name in enumerate("abcd")))
    found = observations_of(survey, settings=ProfileSettings(stations=("d", "b")))
    assert found.receiver_names == ("b", "d")
    assert found.position_m[0] == 0.0
    with pytest.raises(SurveyError, match="no station 'e'"):
        observations_of(survey, settings=ProfileSettings(stations=("a", "e")))
