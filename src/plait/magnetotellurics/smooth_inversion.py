"""The conventional inversion in one call: pixels or bricks, smoothness, Occam or Gauss-Newton."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.data_model import DataModel, SectionModel, StaticShiftModel
from plait.magnetotellurics.forward_2d import Problem
from plait.magnetotellurics.inversion import (
    Checkpoint,
    InversionResult,
    StepRule,
    StoppingRule,
    invert,
)
from plait.magnetotellurics.layered_model import LayeredModel
from plait.magnetotellurics.layered_start import Start, layered_start
from plait.magnetotellurics.misfit import Misfit
from plait.magnetotellurics.model_map import ModelMap, pixel_map
from plait.magnetotellurics.observations import Observations
from plait.magnetotellurics.penalty import RoughnessPenalty
from plait.magnetotellurics.regularization import (
    Smoothness,
    roughness_matrix,
    with_static_shifts,
)
from plait.magnetotellurics.step_rules import OccamRule


@dataclass(frozen=True, kw_only=True)
class SmoothInversion:
    """Settings of a conventional inversion.

    Attributes:
        start_log10_rho: uniform start, and reference unless a reference model is given.
        start: UNIFORM, or LAYERED to fit each column alone first.
        smoothness: weights of the roughness.
        rule: OccamRule or GaussNewtonRule.
        stopping: target RMS and steps.
        bounds: of log10 rho.
        static_shift_weight: None keeps the data's level; a number solves for one gain per station
            and mode, penalized by weight * (log10 gain)^2 next to the roughness.
        huber: None for least squares; a number reweights residuals beyond it (misfit.py).
        num_workers: threads over frequencies and modes.
    """

    start_log10_rho: float = 2.0
    start: Start = Start.UNIFORM
    smoothness: Smoothness = field(default_factory=Smoothness)
    rule: StepRule = field(default_factory=OccamRule)
    stopping: StoppingRule = field(default_factory=StoppingRule)
    bounds: tuple[float, float] = (-2.0, 6.0)
    static_shift_weight: float | None = None
    huber: float | None = None
    num_workers: int = 1

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise InversionError(f"num_workers={self.num_workers} must be at least 1")
        check_weights(
            bounds=self.bounds, static_shift_weight=self.static_shift_weight, huber=self.huber
        )


def check_weights(
    *, bounds: tuple[float, float], static_shift_weight: float | None, huber: float | None
) -> None:
    """Check what conventional and learnt inversions share.

    Raises:
        InversionError: bounds that do not increase, weights that are not positive.
    """
    if not bounds[0] < bounds[1]:
        raise InversionError(f"bounds={bounds} must increase; they are of log10 rho")
    for name, weight in (("static_shift_weight", static_shift_weight), ("huber", huber)):
        if weight is not None and weight <= 0:
            raise InversionError(f"{name}={weight} must be positive, or None")


@dataclass(frozen=True, kw_only=True)
class SmoothSection:
    """A section found by a conventional inversion.

    Attributes:
        log10_rho: mesh.ground_shape.
        static_shift_log10: (2, n_rx) gains of apparent resistivity, TE and TM; zeros unless asked.
        result: the run itself: history, predicted values, reason to stop.
    """

    log10_rho: RealArray
    static_shift_log10: RealArray
    result: InversionResult


def invert_smoothly(
    problem: Problem,
    observations: Observations,
    *,
    settings: SmoothInversion,
    model_map: ModelMap | None = None,
    reference_log10_rho: RealArray | None = None,
    start_at: tuple[RealArray, RealArray] | None = None,
    resume: Checkpoint | None = None,
    on_step: Callable[[Checkpoint], None] = lambda _: None,
) -> SmoothSection:
    """Find the smoothest section that fits.

    Args:
        problem: mesh, receivers and frequencies of the observations.
        observations: any mix of TE, TM and tipper.
        settings: how.
        model_map: bricks, as of an Occam2D model file; one parameter per cell by default.
        reference_log10_rho: (n_parameters,), where roughness is measured from.
        start_at: log10 rho (n_parameters,) and static shifts (2, n_rx) to begin with, instead of
            the settings' start.
        resume: where an earlier run of the same problem stood.
        on_step: called after each step.
    """
    model_map = model_map or pixel_map(problem.mesh)
    model: DataModel = SectionModel(
        problem=problem,
        observations=observations,
        model_map=model_map,
        num_workers=settings.num_workers,
    )
    layered: DataModel = LayeredModel(
        problem=problem, observations=observations, model_map=model_map
    )
    roughness = roughness_matrix(
        model_map,
        thickness_m=problem.mesh.ground_thickness_m,
        width_m=problem.mesh.width_m,
        smoothness=settings.smoothness,
    )
    num_cells = model_map.num_parameters
    num_rx = problem.receivers.num_receivers
    start = np.full(num_cells, settings.start_log10_rho)
    reference = start if reference_log10_rho is None else reference_log10_rho
    if settings.static_shift_weight is not None:
        model = StaticShiftModel(section=model, observations=observations)
        layered = StaticShiftModel(section=layered, observations=observations)
        roughness = with_static_shifts(
            roughness, num_shifts=2 * num_rx, weight=settings.static_shift_weight
        )
        start = np.concatenate([start, np.zeros(2 * num_rx)])
        reference = np.concatenate([reference, np.zeros(2 * num_rx)])
    misfit = Misfit(observations=observations, huber=settings.huber)
    penalty = RoughnessPenalty(matrix=roughness, reference=reference)
    if start_at is not None:
        shifts = start_at[1].ravel() if settings.static_shift_weight is not None else []
        start = np.clip(np.concatenate([start_at[0], shifts]), *settings.bounds)
    elif settings.start is Start.LAYERED:
        start = layered_start(
            layered, misfit=misfit, penalty=penalty, start=start, bounds=settings.bounds
        )
    result = invert(
        model,
        misfit=misfit,
        penalty=penalty,
        start=start,
        rule=settings.rule,
        stopping=settings.stopping,
        bounds=settings.bounds,
        resume=resume,
        on_step=on_step,
    )
    shifts = np.zeros(2 * num_rx)
    if settings.static_shift_weight is not None:
        shifts = result.parameters[num_cells:]
    return SmoothSection(
        log10_rho=model_map.log10_rho(result.parameters[:num_cells]),
        static_shift_log10=shifts.reshape(2, num_rx),
        result=result,
    )
