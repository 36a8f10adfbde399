"""The inversion loop: linearize, take a step, judge it, stop.

A step rule (step_rules.py) gets the linearized problem and a way to try models, and returns the
next one; the loop records every step and stops by StoppingRule.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.data_model import DataModel
from plait.magnetotellurics.linear_step import LinearStep
from plait.magnetotellurics.misfit import Misfit
from plait.magnetotellurics.penalty import Penalty

Limit = float | RealArray


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model that was tried: parameters, predicted values, residual over error, RMS, roughness."""

    parameters: RealArray
    values: RealArray
    residual: RealArray
    rms: float
    roughness: float
    trade_off: float


@dataclass(frozen=True, kw_only=True)
class StoppingRule:
    """When to stop.

    Attributes:
        target_rms: the discrepancy principle; 1 where the errors are believed.
        max_steps: steps, each with one Jacobian.
        min_relative_drop: a step that lowers RMS by less than this share is the last one.
        min_steps: taken even from a start at the target, to find a smaller penalty there.
    """

    target_rms: float = 1.0
    max_steps: int = 10
    min_relative_drop: float = 0.005
    min_steps: int = 0

    def __post_init__(self) -> None:
        if self.target_rms <= 0 or self.max_steps < 1:
            raise InversionError("target_rms and max_steps must be positive")
        if not 0 <= self.min_steps <= self.max_steps:
            raise InversionError(f"min_steps={self.min_steps} lies outside 0 to {self.max_steps}")


class StepRule(Protocol):
    """How to get from one model to the next."""

    def next_trial(
        self, step: LinearStep, *, now: Trial, attempt: "Attempt", target_rms: float
    ) -> Trial:
        """Give the next model; its RMS is below now's, or it is smoother at the target."""
        ...


Attempt = Callable[[RealArray, float], Trial]


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One line of the history: after this step."""

    step: int
    rms: float
    roughness: float
    trade_off: float
    num_forward: int
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a run stands; invert goes on from it as if it had never stopped."""

    parameters: RealArray
    trade_off: float
    history: tuple[StepRecord, ...]


@dataclass(frozen=True, kw_only=True)
class InversionResult:
    """The last model, its predicted data, and how it was reached."""

    parameters: RealArray
    values: RealArray
    rms: float
    trade_off: float
    history: tuple[StepRecord, ...]
    stopped_because: str

    @property
    def num_steps(self) -> int:
        """Steps taken, each with one Jacobian."""
        return len(self.history) - 1


def invert(
    model: DataModel,
    *,
    misfit: Misfit,
    penalty: Penalty,
    start: RealArray,
    rule: StepRule,
    stopping: StoppingRule,
    bounds: tuple[Limit, Limit] = (-2.0, 6.0),
    resume: Checkpoint | None = None,
    on_step: Callable[[Checkpoint], None] = lambda _: None,
) -> InversionResult:
    """Minimize the penalty subject to the misfit.

    Args:
        model: parameters to data.
        misfit: of the observations.
        penalty: roughness, or a learnt prior's.
        start: (n_parameters,).
        rule: an Occam or a Gauss-Newton step.
        stopping: when to stop.
        bounds: every parameter is kept between these, numbers or (n_parameters,).
        resume: a checkpoint of the same problem, in the place of the start.
        on_step: called with the checkpoint after every step, to show progress or to save.

    Returns:
        The best model found. RMS never rises from one step to the next, except that an Occam step
        under the target may trade misfit for smoothness up to the target.

    Raises:
        InversionError: vectors of the wrong length, a start outside the bounds.
    """
    began = time.perf_counter() - (resume.history[-1].duration_s if resume else 0.0)
    num_forward = resume.history[-1].num_forward - 1 if resume else 0

    def attempt(parameters: RealArray, trade_off: float) -> Trial:
        nonlocal num_forward
        num_forward += 1
        inside = np.clip(parameters, *bounds)
        values = model.predict(inside)
        return Trial(
            parameters=inside,
            values=values,
            residual=misfit.residual(values),
            rms=misfit.rms(values),
            roughness=penalty.value(inside),
            trade_off=trade_off,
        )

    _check_start(resume.parameters if resume else start, model, bounds)
    if resume:
        now = attempt(resume.parameters, resume.trade_off)
        history = list(resume.history)
    else:
        now = attempt(start, float("nan"))
        history = [_record(0, now, num_forward, began)]
        on_step(_checkpoint(now, history))
    while (reason := _reason_to_stop(history, stopping)) is None:
        step = linear_step(model, misfit, penalty, now.parameters)
        then = rule.next_trial(step, now=now, attempt=attempt, target_rms=stopping.target_rms)
        is_simpler = then.rms <= stopping.target_rms and then.roughness < now.roughness
        if then.rms < now.rms or is_simpler:
            now = then
        history.append(_record(len(history), now, num_forward, began))
        on_step(_checkpoint(now, history))
    return InversionResult(
        parameters=now.parameters,
        values=now.values,
        rms=now.rms,
        trade_off=now.trade_off,
        history=tuple(history),
        stopped_because=reason,
    )


def _check_start(start: RealArray, model: DataModel, bounds: tuple[Limit, Limit]) -> None:
    if start.shape != (model.num_parameters,):
        raise InversionError(f"the start has shape {start.shape}, not ({model.num_parameters},)")
    if (start < bounds[0]).any() or (start > bounds[1]).any():
        raise InversionError(
            f"the start lies outside the bounds {np.min(bounds[0]):g} to {np.max(bounds[1]):g}"
        )


def linear_step(
    model: DataModel, misfit: Misfit, penalty: Penalty, parameters: RealArray
) -> LinearStep:
    """Linearize a model's data and its penalty at these parameters, (n_parameters,)."""
    sensitivity = model.linearize(parameters)
    weight = misfit.root_weight(sensitivity.values)
    quadratic = penalty.near(parameters)
    return LinearStep(
        jacobian=misfit.whitened(sensitivity.jacobian) * weight[:, None],
        residual=misfit.residual(sensitivity.values) * weight,
        root_weight=weight,
        roughness=quadratic.matrix,
        departure=parameters - quadratic.reference,
        reference=quadratic.reference,
    )


def _reason_to_stop(history: list[StepRecord], stopping: StoppingRule) -> str | None:
    """Give the reason, or None to go on; a resumed run asks the same of the same history."""
    if history[-1].rms <= stopping.target_rms:
        is_enough = len(history) > stopping.min_steps
        return "the target RMS is reached" if is_enough else None
    if len(history) > 1:
        drop = 1 - history[-1].rms / history[-2].rms
        if drop < stopping.min_relative_drop:
            return f"the last step lowered RMS by {100 * drop:.2g} % only"
    if len(history) > stopping.max_steps:
        return f"{stopping.max_steps} steps are done"
    return None


def _checkpoint(now: Trial, history: list[StepRecord]) -> Checkpoint:
    return Checkpoint(parameters=now.parameters, trade_off=now.trade_off, history=tuple(history))


def _record(number: int, trial: Trial, num_forward: int, began: float) -> StepRecord:
    return StepRecord(
        step=number,
        rms=trial.rms,
        roughness=trial.roughness,
        trade_off=trial.trade_off,
        num_forward=num_forward,
        duration_s=time.perf_counter() - began,
    )
