"""The inversion loop: linearize, take a step, judge it, stop.

A step rule (step_rules.py) gets the linearized problem and a way to try models, and returns the
next one; the loop records every step and stops by StoppingRule.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.data_model import DataModel
from plait.magnetotellurics.linear_step import LinearStep
from plait.magnetotellurics.misfit import Misfit


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model that was tried: its parameters, predicted values, RMS and roughness."""

    parameters: RealArray
    values: RealArray
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
    """

    target_rms: float = 1.0
    max_steps: int = 10
    min_relative_drop: float = 0.005

    def __post_init__(self) -> None:
        if self.target_rms <= 0 or self.max_steps < 1:
            raise InversionError("target_rms and max_steps must be positive")


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
class InversionResult:
    """The last model, its predicted data, and how it was reached."""

    parameters: RealArray
    values: RealArray
    rms: float
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
    roughness: Any,
    reference: RealArray,
    start: RealArray,
    rule: StepRule,
    stopping: StoppingRule,
    bounds: tuple[float, float] = (-2.0, 6.0),
    on_step: Callable[[StepRecord], None] = lambda _: None,
) -> InversionResult:
    """Minimize roughness of (parameters - reference) subject to the misfit.

    Args:
        model: parameters to data.
        misfit: of the observations.
        roughness: R, sparse symmetric positive definite, (n_parameters, n_parameters).
        reference: (n_parameters,).
        start: (n_parameters,).
        rule: an Occam or a Gauss-Newton step.
        stopping: when to stop.
        bounds: every parameter is kept between these, in log10 ohm m.
        on_step: called after every step, to show progress or to save.

    Returns:
        The best model found. RMS never rises from one step to the next, except that an Occam step
        under the target may trade misfit for smoothness up to the target.

    Raises:
        InversionError: vectors of the wrong length, a start outside the bounds.
    """
    for name, vector in (("reference", reference), ("start", start)):
        if vector.shape != (model.num_parameters,):
            raise InversionError(f"{name} has shape {vector.shape}, not ({model.num_parameters},)")
    if start.min() < bounds[0] or start.max() > bounds[1]:
        raise InversionError(f"the start lies outside the bounds {bounds}")
    began = time.perf_counter()
    num_forward = 0

    def attempt(parameters: RealArray, trade_off: float) -> Trial:
        nonlocal num_forward
        num_forward += 1
        inside = np.clip(parameters, *bounds)
        values = model.predict(inside)
        return _trial(inside, values, trade_off)

    def _trial(parameters: RealArray, values: RealArray, trade_off: float) -> Trial:
        change = parameters - reference
        return Trial(
            parameters=parameters,
            values=values,
            rms=misfit.rms(values),
            roughness=float(change @ (roughness @ change)),
            trade_off=trade_off,
        )

    now = attempt(start, float("nan"))
    history = [_record(0, now, num_forward, began)]
    on_step(history[0])
    reason = f"{stopping.max_steps} steps are done"
    for number in range(1, stopping.max_steps + 1):
        if now.rms <= stopping.target_rms:
            reason = "the target RMS is reached"
            break
        sensitivity = model.linearize(now.parameters)
        weight = misfit.root_weight(sensitivity.values)
        step = LinearStep(
            jacobian=misfit.whitened(sensitivity.jacobian) * weight[:, None],
            residual=misfit.residual(sensitivity.values) * weight,
            roughness=roughness,
            departure=now.parameters - reference,
            reference=reference,
        )
        then = rule.next_trial(step, now=now, attempt=attempt, target_rms=stopping.target_rms)
        drop = 1 - then.rms / now.rms
        if then.rms < now.rms:
            now = then
        history.append(_record(number, now, num_forward, began))
        on_step(history[-1])
        if now.rms > stopping.target_rms and drop < stopping.min_relative_drop:
            reason = f"the last step lowered RMS by {100 * max(drop, 0):.2g} % only"
            break
    else:
        if now.rms <= stopping.target_rms:
            reason = "the target RMS is reached"
    return InversionResult(
        parameters=now.parameters,
        values=now.values,
        rms=now.rms,
        history=tuple(history),
        stopped_because=reason,
    )


def _record(number: int, trial: Trial, num_forward: int, began: float) -> StepRecord:
    return StepRecord(
        step=number,
        rms=trial.rms,
        roughness=trial.roughness,
        trade_off=trial.trade_off,
        num_forward=num_forward,
        duration_s=time.perf_counter() - began,
    )
