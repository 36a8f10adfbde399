"""What the data resolve of a section: deviations of its cells, and the depth of investigation."""

from dataclasses import dataclass

import numpy as np

from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.coded_section import CodedSection
from plait.magnetotellurics.data_model import DataModel, SectionModel, StaticShiftModel
from plait.magnetotellurics.forward_2d import Problem
from plait.magnetotellurics.inversion import InversionResult, linear_step
from plait.magnetotellurics.linear_solver import sparse
from plait.magnetotellurics.misfit import Misfit
from plait.magnetotellurics.model_map import pixel_map
from plait.magnetotellurics.observations import Observations
from plait.magnetotellurics.penalty import RoughnessPenalty
from plait.magnetotellurics.posterior import posterior_of
from plait.magnetotellurics.prior_inversion import PriorInversion, coded_parts
from plait.magnetotellurics.regularization import (
    Smoothness,
    roughness_matrix,
    with_static_shifts,
)
from plait.magnetotellurics.smooth_inversion import SmoothInversion

# Closer to the reference than the inversion itself: with the inversion's tiny weight the posterior
# would extrapolate smoothness for ever downwards.
_CLOSENESS = 0.05


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """How well a smooth section is known.

    Attributes:
        deviation: mesh.ground_shape, of the linearized posterior, decades.
        reference_share: mesh.ground_shape, the depth-of-investigation index.
    """

    deviation: RealArray
    reference_share: RealArray


def smooth_resolution(
    problem: Problem,
    observations: Observations,
    *,
    result: InversionResult,
    settings: SmoothInversion,
) -> Resolution:
    """Linearize at the end of a smooth inversion of pixels; static shifts are uncertain too."""
    pixels = pixel_map(problem.mesh)
    model: DataModel = SectionModel(
        problem=problem,
        observations=observations,
        model_map=pixels,
        num_workers=settings.num_workers,
    )
    smoothness = Smoothness(
        horizontal=settings.smoothness.horizontal,
        vertical=settings.smoothness.vertical,
        closeness=_CLOSENESS,
    )
    roughness = roughness_matrix(
        pixels,
        thickness_m=problem.mesh.ground_thickness_m,
        width_m=problem.mesh.width_m,
        smoothness=smoothness,
    )
    num_shifts = 0
    if settings.static_shift_weight is not None:
        num_shifts = 2 * problem.receivers.num_receivers
        model = StaticShiftModel(section=model, observations=observations)
        roughness = with_static_shifts(
            roughness, num_shifts=num_shifts, weight=settings.static_shift_weight
        )
    step = linear_step(
        model,
        Misfit(observations=observations, huber=settings.huber),
        RoughnessPenalty(matrix=roughness, reference=result.parameters),
        result.parameters,
    )
    # The index asks for a change of the section's reference, not of the shifts'.
    count = pixels.num_parameters
    found = posterior_of(step, trade_off=_trade_off(result), num_changed=count)
    deviation, share = (
        pixels.log10_rho(values[:count]) * problem.mesh.is_ground
        for values in (found.deviation, found.reference_share)
    )
    return Resolution(deviation=deviation, reference_share=share)


def coded_deviation(
    problem: Problem,
    observations: Observations,
    *,
    section: CodedSection,
    result: InversionResult,
    settings: PriorInversion,
) -> RealArray:
    """Give the deviation of each cell, mesh.ground_shape, of a section with a learnt prior.

    It is the spread of the codes that fit, carried through the decoder's Jacobian: that of
    sections which the prior allows.
    """
    parts = coded_parts(problem, observations, section=section, settings=settings)
    step = linear_step(
        parts.model,
        Misfit(observations=observations, huber=settings.huber),
        parts.penalty,
        result.parameters,
    )
    slope = section.slope(result.parameters[: section.num_parameters])
    shifts = sparse.csr_array((slope.shape[0], parts.num_shifts))
    found = posterior_of(
        step, trade_off=_trade_off(result), slope=sparse.hstack([slope, shifts], format="csr")
    )
    return found.deviation.reshape(problem.mesh.ground_shape)


def _trade_off(result: InversionResult) -> float:
    """A run that began at the target took no step; its penalty then counts as the errors do."""
    return result.trade_off if np.isfinite(result.trade_off) else 1.0
