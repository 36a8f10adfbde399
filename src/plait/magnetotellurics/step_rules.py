"""Occam and Gauss-Newton: two ways to choose the next model from the linearized problem."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.inversion import Attempt, Trial
from plait.magnetotellurics.linear_step import LinearStep


@dataclass(frozen=True, kw_only=True)
class OccamRule:
    """Search the trade-off along the full step [Constable et al. 1987; deGroot-Hedlin 1990].

    First the trade-off of least RMS by a search in powers of search_factor; where that is under
    the target, the largest trade-off at the target, by secants in log-log. Where no full step
    lowers RMS, the step is cut in halves.

    Attributes:
        search_factor: ratio of neighbouring trade-offs.
        max_trials: forward runs of one step.
        target_share: how far under its goal a step may end, as a share of the goal.
        max_drop: a step need not lower RMS by more than this factor; big early steps leave the
            linear range.
        max_corrections: how often a step that misses its goal is bent with new residuals and the
            same Jacobian; for models that are curved functions of their parameters.
    """

    search_factor: float = 10.0
    max_trials: int = 10
    target_share: float = 0.01
    max_drop: float = 3.0
    max_corrections: int = 0

    def __post_init__(self) -> None:
        if self.search_factor <= 1 or self.max_trials < 3 or self.max_drop <= 1:
            raise InversionError("need search_factor > 1, max_trials >= 3 and max_drop > 1")

    def next_trial(
        self, step: LinearStep, *, now: Trial, attempt: Attempt, target_rms: float
    ) -> Trial:
        """Give the smoothest model at the goal, or the one of least RMS above it."""
        goal = max(target_rms * (1 - self.target_share / 2), now.rms / self.max_drop)
        first = now.trade_off if np.isfinite(now.trade_off) else step.largest_trade_off / 100
        trials = [attempt(step.model(first), first)]

        def go(trade_off: float) -> Trial:
            trials.append(attempt(step.model(trade_off), trade_off))
            return trials[-1]

        best = self._descend(trials, go, goal)
        for _ in range(self.max_corrections):
            if best.rms <= goal:
                break
            bent = step.corrected(best.parameters, best.residual, best.trade_off)
            trials.append(attempt(bent, best.trade_off))
            if trials[-1].rms > 0.99 * best.rms:
                break
            best = trials[-1]
        if best.rms <= goal:
            best = self._smoothest(trials, go, goal)
        elif best.rms >= now.rms:
            best = self._cut(step, best, now, attempt)
        return best

    def _descend(self, trials: list[Trial], go: Callable[[float], Trial], goal: float) -> Trial:
        """Walk down the curve of RMS against trade-off until it turns or passes the goal."""
        best = trials[0]
        for factor in (1 / self.search_factor, self.search_factor):
            here = best if factor < 1 else trials[0]
            while best.rms > goal and len(trials) < self.max_trials:
                then = go(here.trade_off * factor)
                if then.rms >= here.rms:
                    break
                here = best = then if then.rms < best.rms else best
            if best is not trials[0]:
                break
        return best

    def _smoothest(self, trials: list[Trial], go: Callable[[float], Trial], goal: float) -> Trial:
        """Find the largest trade-off whose RMS is at the goal."""
        while len(trials) < self.max_trials:
            under = max((t for t in trials if t.rms <= goal), key=lambda t: t.trade_off)
            above = [t for t in trials if t.rms > goal and t.trade_off > under.trade_off]
            if under.rms >= goal * (1 - self.target_share):
                return under
            if not above:
                go(under.trade_off * self.search_factor)
                continue
            upper = min(above, key=lambda t: t.trade_off)
            if upper.trade_off < under.trade_off * 1.05:
                return under
            share = np.log(goal * (1 - self.target_share / 2) / under.rms)
            share /= np.log(upper.rms / under.rms)
            ratio = upper.trade_off / under.trade_off
            go(under.trade_off * ratio ** float(np.clip(share, 0.1, 0.9)))
        return max((t for t in trials if t.rms <= goal), key=lambda t: t.trade_off)

    def _cut(self, step: LinearStep, best: Trial, now: Trial, attempt: Attempt) -> Trial:
        """Go part of the way to the best full step."""
        for halving in range(1, 6):
            share = 0.5**halving
            between = now.parameters + share * (step.model(best.trade_off) - now.parameters)
            then = attempt(between, best.trade_off)
            if then.rms < now.rms:
                return then
        return now


@dataclass(frozen=True, kw_only=True)
class GaussNewtonRule:
    """One trade-off per step, lowered from step to step, with backtracking on the objective.

    Attributes:
        cooling: factor from one trade-off to the next, under 1.
        first_share: the first trade-off as a share of LinearStep.largest_trade_off.
        sufficient: Armijo's constant [Nocedal and Wright 2006, eq. 3.4].
        max_halvings: of the step.
    """

    cooling: float = 0.3
    first_share: float = 1e-3
    sufficient: float = 1e-4
    max_halvings: int = 6

    def __post_init__(self) -> None:
        if not 0 < self.cooling < 1 or self.first_share <= 0:
            raise InversionError("need 0 < cooling < 1 and first_share > 0")

    def next_trial(
        self, step: LinearStep, *, now: Trial, attempt: Attempt, target_rms: float
    ) -> Trial:
        """Give the first point along the step that lowers the objective enough."""
        trade_off = (
            now.trade_off * self.cooling
            if np.isfinite(now.trade_off)
            else step.largest_trade_off * self.first_share
        )
        full = step.model(trade_off) - now.parameters
        num_data = len(step.residual)
        rough = step.roughness @ step.departure
        slope = 2 * (trade_off * rough - step.jacobian.T @ step.residual) @ full
        objective = num_data * now.rms**2 + trade_off * now.roughness
        share = 1.0
        for _ in range(self.max_halvings):
            then = attempt(now.parameters + share * full, trade_off)
            reached = num_data * then.rms**2 + trade_off * then.roughness
            if reached <= objective + self.sufficient * share * slope:
                return then
            share /= 2
        return now
