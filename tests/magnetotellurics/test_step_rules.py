"""Occam's choice within one step, on problems of a few numbers."""

from dataclasses import dataclass

import numpy as np
import pytest

from plait.magnetotellurics.inversion import Trial
from plait.magnetotellurics.linear_solver import sparse
from plait.magnetotellurics.linear_step import LinearStep
from plait.magnetotellurics.step_rules import OccamRule


@dataclass
class _Curved:
    """Data u + bend u^2 with u = matrix m, seen from m = 0; errors are one, the noise 0.3."""

    bend: float
    seed: int = 3

    def __post_init__(self) -> None:
        generator = np.random.default_rng(self.seed)
        self.matrix = generator.standard_normal((20, 6))
        self.data = self.values(generator.standard_normal(6)) + 0.3 * generator.standard_normal(20)
        self.trials: list[Trial] = []
        self.now = self.attempt(np.zeros(6), np.inf)
        self.step = LinearStep(
            jacobian=self.matrix,
            residual=self.now.residual,
            root_weight=np.ones(20),
            roughness=sparse.csc_array(np.eye(6)),
            departure=np.zeros(6),
            reference=np.zeros(6),
        )

    def values(self, parameters):
        u = self.matrix @ parameters
        return u + self.bend * u**2

    def attempt(self, parameters, trade_off):
        values = self.values(parameters)
        residual = self.data - values
        trial = Trial(
            parameters=parameters,
            values=values,
            residual=residual,
            rms=float(np.sqrt(np.mean(residual**2))),
            roughness=float(parameters @ parameters),
            trade_off=trade_off,
        )
        self.trials.append(trial)
        return trial

    def choose(self, rule, target_rms):
        return rule.next_trial(self.step, now=self.now, attempt=self.attempt, target_rms=target_rms)


SETTINGS = {"search_factor": 3, "max_trials": 14, "max_drop": 1e6, "max_corrections": 4}


@pytest.mark.parametrize("bend", [0.05, 0.1, 0.2])
def test_a_step_that_follows_the_curve_fits_better_with_the_same_jacobian(bend):
    straight, along = (
        [
            _Curved(bend, seed).choose(OccamRule(**SETTINGS, follow=follow), target_rms=0.1).rms
            for seed in range(20)
        ]
        for follow in (False, True)
    )
    assert np.median(along) < 0.9 * np.median(straight)
    assert all(a < 1.01 * b for a, b in zip(along, straight, strict=True))


def test_on_a_curve_the_target_is_met_with_the_smoothest_model_too():
    rule = OccamRule(**SETTINGS, follow=True)
    met = [_Curved(0.05, seed).choose(rule, target_rms=0.5).rms for seed in range(20)]
    assert all(rms <= 0.5 for rms in met)
    assert min(met) > 0.45


def test_following_changes_nothing_where_data_are_straight():
    straight = _Curved(bend=0.0).choose(OccamRule(**SETTINGS), target_rms=0.1)
    along = _Curved(bend=0.0).choose(OccamRule(**SETTINGS, follow=True), target_rms=0.1)
    np.testing.assert_allclose(along.parameters, straight.parameters, rtol=1e-6)


def test_the_target_is_met_with_the_smoothest_model_and_a_limit_ends_below_it():
    free = _Curved(bend=0.0).choose(OccamRule(max_drop=1e6), target_rms=2.0)
    assert 1.95 < free.rms <= 2.0
    limit = free.trade_off / 50
    limited = _Curved(bend=0.0).choose(OccamRule(max_drop=1e6, max_trade_off=limit), target_rms=2.0)
    assert limited.trade_off == pytest.approx(limit)
    assert limited.rms < free.rms
    assert limited.roughness > free.roughness


def test_a_limit_above_the_trade_off_of_the_target_changes_nothing():
    free = _Curved(bend=0.0).choose(OccamRule(max_drop=1e6), target_rms=2.0)
    loose = OccamRule(max_drop=1e6, max_trade_off=2 * free.trade_off)
    assert _Curved(bend=0.0).choose(loose, target_rms=2.0).trade_off == free.trade_off
