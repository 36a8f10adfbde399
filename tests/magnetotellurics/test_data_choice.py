import numpy as np
import pytest

from plait.errors import SurveyError
from plait.magnetotellurics.data_choice import DataChoice, chosen_data
from plait.magnetotellurics.observations import Component, Observations


@pytest.fixture
def observations():
    """Two stations, three frequencies, TE; each value is its row."""
    f, r, c = (g.ravel() for g in np.meshgrid(range(3), range(2), [0, 1], indexing="ij"))
    return Observations(
        frequency_hz=np.array([100.0, 10.0, 1.0]), position_m=np.array([0.0, 500.0]),
        receiver_names=("a1", "b2"), frequency_index=f, receiver_index=r, component=c,
        value=np.arange(12.0), error=np.ones(12),
    )  # fmt: skip


def named(observations, row):
    """A row's station, frequency and component, whatever the indices."""
    return (
        observations.receiver_names[observations.receiver_index[row]],
        observations.frequency_hz[observations.frequency_index[row]],
        Component(observations.component[row]),
    )


def test_all_data_are_taken_unless_asked_otherwise(observations):
    assert chosen_data(observations, DataChoice()) is observations


def test_rows_keep_their_station_frequency_and_component_and_empty_ones_go(observations, tmp_path):
    points = tmp_path / "points.csv"
    points.write_text(
        "# noisy\nstation,component,min_frequency_hz,max_frequency_hz\n\na1, TE_PHASE, 5, 20\n"
    )
    choice = DataChoice(min_frequency_hz=2.0, left_out=str(points))
    found = chosen_data(observations, choice)
    np.testing.assert_array_equal(found.frequency_hz, [100.0, 10.0])
    for row in range(found.num_data):
        assert named(found, row) == named(observations, int(found.value[row]))
    np.testing.assert_array_equal(found.value, [0, 1, 2, 3, 4, 6, 7])
    assert found.notes == ("5 of 12 data dropped: their frequency, named in points.csv",)


def test_a_station_left_out_leaves_the_profile(observations):
    found = chosen_data(observations, DataChoice(stations_left_out=("a1",)))
    assert found.receiver_names == ("b2",)
    np.testing.assert_array_equal(found.position_m, [500.0])
    np.testing.assert_array_equal(found.value, [2, 3, 6, 7, 10, 11])


@pytest.mark.parametrize(
    ("line", "left"),
    [("*,TE,0,inf", 0), ("*,te_log10_rho,0,inf", 6), ("b2,*,1,1", 10), ("*,TM,0,inf", 12)],
)
def test_stars_and_modes_stand_for_all_of_theirs(observations, tmp_path, line, left):
    points = tmp_path / "points.csv"
    points.write_text(line)
    choice = DataChoice(left_out=str(points))
    if not left:
        with pytest.raises(SurveyError, match="leaves none"):
            chosen_data(observations, choice)
        return
    assert chosen_data(observations, choice).num_data == left


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a1,TE,0", r"points\.csv:1: expected station,component"),
        ("\nc3,TE,0,1", r"points\.csv:2: no station 'c3'"),
        ("a1,TX,0,1", r"points\.csv:1: no component 'TX'"),
        ("a1,TE,low,1", r"points\.csv:1: expected a frequency in Hz, got 'low'"),
        ("a1,TE,0,nan", r"points\.csv:1: expected a frequency in Hz, got 'nan'"),
    ],
)
def test_a_mistake_is_named_with_its_line(observations, tmp_path, text, message):
    points = tmp_path / "points.csv"
    points.write_text(text)
    with pytest.raises(SurveyError, match=message):
        chosen_data(observations, DataChoice(left_out=str(points)))


def test_choices_that_make_no_sense_are_refused(observations, tmp_path):
    with pytest.raises(SurveyError, match="min_frequency_hz"):
        DataChoice(min_frequency_hz=2.0, max_frequency_hz=1.0)
    with pytest.raises(SurveyError, match="no station 'a2'"):
        chosen_data(observations, DataChoice(stations_left_out=("a2",)))
    with pytest.raises(SurveyError, match="cannot be read"):
        chosen_data(observations, DataChoice(left_out=str(tmp_path / "absent.csv")))
