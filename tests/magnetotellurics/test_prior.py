import numpy as np
import pytest

from plait.errors import InversionError
from plait.magnetotellurics.prior import Bumps, Layer, Prior, Range
from plait.magnetotellurics.prior_file import prior_from_table, prior_to_table, read_prior
from plait.magnetotellurics.prior_sampler import draw_sections

TOML = """
name = "thickness"
background_log10_rho = [1.8, 2.2]
lateral_share = 0.3

[[layer]]
name = "conductor"
top_m = [100, 300]
thickness_m = [50, 200]
log10_rho = [0.5, 1.0]
probability = 0.9

[[layer]]
name = "basement"
log10_rho = 2.5
log10_rho_base = [3.0, 3.5]
num_steps = 4

[bumps]
max_count = 2
amplitude = 0.1
"""
ONE_COLUMN = np.zeros(1)


def fixed(*layers, **changes):
    return Prior(name="x", background_log10_rho=Range(2.0, 2.0), layers=layers, **changes)


def test_a_prior_is_read_from_toml_and_goes_through_json_tables_unchanged(tmp_path):
    path = tmp_path / "thickness.toml"
    path.write_text(TOML)
    prior = read_prior(path)
    assert prior.layers[0].top_m == Range(100.0, 300.0)
    assert prior.layers[1].log10_rho == Range(2.5, 2.5)
    assert prior.bumps.max_count == 2
    assert prior_from_table(prior_to_table(prior)) == prior


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("thickness_m", "thicknes_m", "Did you mean 'thickness_m'"),
        ("[0.5, 1.0]", "[1.0, 0.5]", "low <= high"),
        ("[0.5, 1.0]", "[0.5, nan]", r"number or \[low, high\]"),
        ("[0.5, 1.0]", "100", "logarithm of ohm m"),
        ("top_m = [100, 300]", "", "needs top_m"),
        ("num_steps = 4", "num_steps = 4.5", "whole number"),
        ("num_steps = 4", "", "together"),
        ("name = ", "name = = ", "not TOML"),
        ('name = "thickness"', "", "name must be given"),
    ],
)
def test_a_mistake_in_a_prior_is_named_with_its_file(tmp_path, old, new, message):
    path = tmp_path / "wrong.toml"
    path.write_text(TOML.replace(old, new, 1))
    with pytest.raises(InversionError, match=message) as caught:
        read_prior(path)
    assert "wrong.toml" in str(caught.value)


def test_a_cut_cell_holds_the_mean_of_both_sides_and_an_absent_layer_nothing():
    prior = fixed(
        Layer(
            name="a", top_m=Range(15, 15), thickness_m=Range(10, 10), log10_rho=Range(0, 0),
        ),
        Layer(name="b", log10_rho=Range(3, 3)),
    )  # fmt: skip
    drawn = draw_sections(prior, z_m=np.arange(0.0, 51, 10), y_m=ONE_COLUMN, count=2, seed=0)
    np.testing.assert_allclose(drawn[1, :, 0], [2.0, 1.0, 1.5, 3.0, 3.0])


def test_values_tops_and_bases_keep_their_ranges_and_fill_them():
    prior = fixed(
        Layer(
            name="a", top_m=Range(100, 200), thickness_m=Range(50, 100), log10_rho=Range(0.5, 1),
            probability=0.5,
        )
    )  # fmt: skip
    z = np.arange(0.0, 501, 5)
    drawn = draw_sections(prior, z_m=z, y_m=ONE_COLUMN, count=2000, seed=3)[:, :, 0]
    there = drawn.min(1) < 1.5
    assert 0.45 < there.mean() < 0.55
    value = drawn[there].min(1)
    assert value.min() >= 0.5 - 1e-12
    assert value.max() <= 1.0 + 1e-12
    thickness = ((2 - drawn[there]) * 5).sum(1) / (2 - value)
    assert thickness.min() == pytest.approx(50, abs=1)
    assert thickness.max() == pytest.approx(100, abs=1)
    top = z[np.argmax(drawn[there] < 2, axis=1)]
    assert top.min() >= 95
    assert top.max() <= 200


def test_steps_rise_with_depth_between_their_ends():
    prior = fixed(
        Layer(
            name="a", top_m=Range(0, 0), log10_rho=Range(2.5, 2.7),
            log10_rho_base=Range(4.4, 4.5), num_steps=10,
        )
    )  # fmt: skip
    drawn = draw_sections(prior, z_m=np.arange(0.0, 101, 1), y_m=ONE_COLUMN, count=50, seed=0)
    assert (np.diff(drawn[:, :, 0], axis=1) > -1e-9).all()
    assert drawn.min() >= 2.5 - 1e-9
    assert drawn.max() <= 4.5 + 1e-9
    assert len(np.unique(np.round(drawn[0], 6))) > 5


def test_sections_wander_along_the_profile_and_neighbours_agree():
    layer = Layer(
        name="a", top_m=Range(100, 200), thickness_m=Range(100, 100), log10_rho=Range(0, 0)
    )
    z, y = np.arange(0.0, 401, 10), np.arange(30) * 100.0
    prior = fixed(layer, lateral_share=0.5, correlation_m=1000.0)
    drawn = draw_sections(prior, z_m=z, y_m=y, count=400, seed=1)
    top = 200 - ((2 - drawn[:, :20]) * 10).sum(1) / 2  # (count, n_y)
    far = np.corrcoef(top[:, 0] - top.mean(1), top[:, -1] - top.mean(1))[0, 1]
    near = np.corrcoef(top[:, 0] - top.mean(1), top[:, 1] - top.mean(1))[0, 1]
    assert near > 0.9 > far
    still = draw_sections(fixed(layer, lateral_share=0.0), z_m=z, y_m=y, count=5, seed=1)
    assert np.ptp(still, axis=2).max() == 0


def test_equal_seeds_draw_equal_sections_and_bumps_stay_small():
    layer = Layer(name="a", top_m=Range(100, 200), log10_rho=Range(0, 1))
    prior = fixed(layer, bumps=Bumps(max_count=3, amplitude=0.2))
    z = np.arange(0.0, 401, 10)
    once, again, other = (
        draw_sections(prior, z_m=z, y_m=ONE_COLUMN, count=100, seed=seed) for seed in (4, 4, 5)
    )
    np.testing.assert_array_equal(once, again)
    assert (once != other).any()
    assert np.abs(once[:, 0]).max() <= 2.0 + 3 * 0.2


def test_depths_that_do_not_increase_are_refused():
    with pytest.raises(InversionError, match="increasing depths"):
        draw_sections(
            fixed(Layer(name="a", top_m=Range(1, 2), log10_rho=Range(0, 1))),
            z_m=np.array([0.0, 2.0, 1.0]), y_m=ONE_COLUMN, count=1, seed=0,
        )  # fmt: skip
