"""The learnt prior's benchmark measures rightly: on truths, and on known errors."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks import mt_sections as made
from benchmarks.mt_prior import CASES, NUM_SEEDS, Sides, compared
from benchmarks.mt_prior_runs import Judged

TRUTHS = [
    (made.prospect(), made.DIPPING),
    (made.prospect(), made.BLOCK),
    (made.province(), made.CRUST),
]


@pytest.mark.parametrize(("layout", "truth"), TRUTHS, ids=lambda x: getattr(x, "name", ""))
def test_a_truth_on_the_mesh_has_hardly_an_error(layout, truth):
    section = made.on_cells(layout.mesh, truth.log10_rho)
    depth = np.nanmax(truth.base_m(layout.position_m))
    assert made.base_error_m(layout.mesh, section, truth) < 0.01 * depth
    assert made.value_error(layout.mesh, section, truth) < 1e-12


@pytest.mark.parametrize(("layout", "truth"), TRUTHS, ids=lambda x: getattr(x, "name", ""))
def test_a_boundary_and_a_value_that_are_off_are_measured_as_such(layout, truth):
    section = made.on_cells(layout.mesh, truth.log10_rho)
    depth = np.nanmax(truth.base_m(layout.position_m))
    off = 0.1 * depth
    deeper = replace(truth, base_m=lambda y: truth.base_m(y) + off)
    assert made.base_error_m(layout.mesh, section, deeper) == pytest.approx(off, rel=0.1)
    body = replace(truth, body_log10_rho=truth.body_log10_rho + 0.2)
    assert made.value_error(layout.mesh, section, body) == pytest.approx(0.2)


def test_a_body_without_a_lower_boundary_counts_as_twice_as_deep():
    layout, truth = TRUTHS[1]
    open_below = np.full(layout.mesh.ground_shape, 0.8)
    assert made.base_error_m(layout.mesh, open_below, truth) == pytest.approx(550.0)


def test_noise_has_the_deviation_that_its_errors_say():
    layout = made.prospect()
    clean = replace(made.empty(layout, made.TE_TM))
    clean = replace(clean, value=np.full(clean.num_data, 1.5))
    noisy = made.with_errors(clean, relative=0.025, seed=0)
    pulls = (noisy.value - clean.value) / noisy.error
    assert np.std(pulls) == pytest.approx(1.0, abs=0.05)
    even = made.noisy(clean, share=0.03, floor=0.005, seed=0)
    np.testing.assert_allclose(even.error, 0.045)
    assert np.std(even.value - clean.value) == pytest.approx(0.045, rel=0.05)


def test_every_case_has_its_targets_and_ratios_are_learnt_over_conventional():
    assert len(CASES) == 8
    assert NUM_SEEDS == 5
    ours = Judged(rms=1.0, residual=0.005, steps=2, base_error=10, value_error=0.02, seconds=1)
    theirs = replace(ours, base_error=40, value_error=0.05)
    sides = Sides(ours=[ours], theirs=[theirs], first=[replace(theirs, value_error=0.1)])
    rows = {row.claim: row for row in compared("x", sides, low_noise=True)}
    assert rows["x, learnt: |d-F|/|d|"].target == 0.0056
    assert rows["x, learnt: steps"].target == 4
    ratio = rows["x: lower boundary, error over conventional's"]
    assert ratio.value == 0.25
    assert ratio.holds is True
    assert rows["x: log10 rho in the target, error over conventional's"].holds is False
    noisier = {row.claim: row for row in compared("x", sides, low_noise=False)}
    assert noisier["x, learnt: RMS"].target == 1.05
