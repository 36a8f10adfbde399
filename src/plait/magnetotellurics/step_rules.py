"""Occam and Gauss-Newton: two ways to choose the next model from the linearized problem."""

from collections.abc import Sequence
from dataclasses import dataclass, field

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
        follow: for such models also: each correction tries a smaller trade-off as well, and the
            trade-off at the target is then searched along models bent from the best one.
        max_trade_off: a step that reaches the target ends at this trade-off at most, though RMS
            be under the target then.
    """

    search_factor: float = 10.0
    max_trials: int = 10
    target_share: float = 0.01
    max_drop: float = 3.0
    max_corrections: int = 0
    follow: bool = False
    max_trade_off: float = np.inf

    def __post_init__(self) -> None:
        if self.search_factor <= 1 or self.max_trials < 3 or self.max_drop <= 1:
            raise InversionError("need search_factor > 1, max_trials >= 3 and max_drop > 1")
        if self.max_trade_off <= 0:
            raise InversionError(f"max_trade_off={self.max_trade_off} must be positive")

    def next_trial(
        self, step: LinearStep, *, now: Trial, attempt: Attempt, target_rms: float
    ) -> Trial:
        """Give the smoothest model at the goal, or the one of least RMS above it."""
        goal = max(target_rms * (1 - self.target_share / 2), now.rms / self.max_drop)
        first = now.trade_off if np.isfinite(now.trade_off) else step.largest_trade_off / 100
        search = _Search(step=step, attempt=attempt)
        search.go(first)
        best = self._descend(search, goal)
        for _ in range(self.max_corrections):
            if best.rms <= goal:
                break
            bent = search.bend(best, best.trade_off)
            if self.follow:
                from_here = _least((best, bent))
                bent = _least((bent, search.bend(from_here, best.trade_off / self.search_factor)))
            if bent.rms > 0.99 * best.rms:
                break
            best = bent
            if self.follow:
                search.stay_near(best)
        if best.rms <= goal:
            best = self._smoothest(search, goal)
            if best.rms <= target_rms and best.trade_off > self.max_trade_off:
                best = _least((best, search.bend(best, self.max_trade_off)))
        elif best.rms >= now.rms:
            best = self._cut(step, best, now, attempt)
        return best

    def _descend(self, search: "_Search", goal: float) -> Trial:
        """Walk down the curve of RMS against trade-off until it turns or passes the goal."""
        trials = search.trials
        best = trials[0]
        for factor in (1 / self.search_factor, self.search_factor):
            here = best if factor < 1 else trials[0]
            while best.rms > goal and len(trials) < self.max_trials:
                then = search.go(here.trade_off * factor)
                if then.rms >= here.rms:
                    break
                here = best = then if then.rms < best.rms else best
            if best is not trials[0]:
                break
        return best

    def _smoothest(self, search: "_Search", goal: float) -> Trial:
        """Find the largest trade-off whose RMS is at the goal."""
        trials = search.trials
        while len(trials) < self.max_trials:
            under = max((t for t in trials if t.rms <= goal), key=lambda t: t.trade_off)
            above = [t for t in trials if t.rms > goal and t.trade_off > under.trade_off]
            if under.rms >= goal * (1 - self.target_share):
                return under
            if not above:
                search.go(under.trade_off * self.search_factor)
                continue
            upper = min(above, key=lambda t: t.trade_off)
            if upper.trade_off < under.trade_off * 1.05:
                return under
            share = np.log(goal * (1 - self.target_share / 2) / under.rms)
            share /= np.log(upper.rms / under.rms)
            ratio = upper.trade_off / under.trade_off
            search.go(under.trade_off * ratio ** float(np.clip(share, 0.1, 0.9)))
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


@dataclass(kw_only=True)
class _Search:
    """The trials of one Occam step. near: what later ones are bent from."""

    step: LinearStep
    attempt: Attempt
    trials: list[Trial] = field(default_factory=list)
    near: Trial | None = None

    def go(self, trade_off: float) -> Trial:
        """Try the model of a trade-off."""
        if self.near is not None:
            return self.bend(self.near, trade_off)
        self.trials.append(self.attempt(self.step.model(trade_off), trade_off))
        return self.trials[-1]

    def bend(self, best: Trial, trade_off: float) -> Trial:
        """Try the model of a trade-off by the residual of another trial."""
        bent = self.step.corrected(best.parameters, best.residual, trade_off)
        self.trials.append(self.attempt(bent, trade_off))
        return self.trials[-1]

    def stay_near(self, best: Trial) -> None:
        """Forget the straight models, which say nothing of the curve near this one."""
        self.trials[:] = [best]
        self.near = best


def _least(trials: Sequence[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.rms)


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
