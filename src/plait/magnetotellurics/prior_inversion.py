"""Inversion for pixels and codes together: a learnt prior where it speaks, smoothness elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.alternation import AlternatingRule
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.code_penalty import CodePenalty
from plait.magnetotellurics.coded_section import CodedSection
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
from plait.magnetotellurics.model_map import pixel_map
from plait.magnetotellurics.observations import Observations
from plait.magnetotellurics.penalty import Penalty, PenaltyWithShifts, RoughnessPenalty
from plait.magnetotellurics.regularization import Smoothness, cell_roughness, roughness_matrix
from plait.magnetotellurics.smooth_inversion import check_weights
from plait.magnetotellurics.step_rules import OccamRule

LEARNT_RULE = OccamRule(
    search_factor=3, max_trials=14, max_drop=10, max_corrections=4, follow=True, max_trade_off=200
)
_START_LATERAL, _START_EDGE = 60.0, 0.3  # over code_weight, and of first differences: fitted


class StepOrder(Enum):
    """Pixels and codes in one step, or pixels everywhere and then codes."""

    JOINT = "joint"
    ALTERNATING = "alternating"


@dataclass(frozen=True, kw_only=True)
class PriorInversion:
    """Settings of an inversion with a learnt prior.

    Attributes:
        start_log10_rho: uniform; the codes start at the encoder's for it.
        smoothness: outside the region, and across its border.
        region_smoothness: of the decoded cells. None by default: order downwards is the prior's
            matter, and along the line cells would count an interface that dips by its contrast and
            flatten it; codes are compared instead.
        code_weight: of |v|^2 of a code alone, beside roughness and times the same trade-off.
        line_share: of this weight for each code on a line. Neighbours that hang together say the
            same thing many times: with the whole weight for each they draw every body towards the
            prior's mean.
        lateral_weight: of the second difference of the codes of neighbours.
        lateral_edge: a larger one is an edge, and costs by its logarithm.
        code_bound: codes stay within this; beyond, the decoder has not been taught.
        start: LAYERED fits each column alone first; UNIFORM begins with the codes of a half-space.
        rule: follows the curve of decoded sections, and ends at a trade-off of 200 at most, one
            over the default code_weight: beyond, codes weigh more than the prior's own probability
            makes them, only to bring RMS back up to the target.
        stopping, bounds, static_shift_weight, huber, num_workers: as SmoothInversion.
        order: JOINT, or ALTERNATING, which has no static shifts.
    """

    start_log10_rho: float = 2.0
    smoothness: Smoothness = field(default_factory=Smoothness)
    region_smoothness: Smoothness = field(
        default_factory=lambda: Smoothness(horizontal=0.0, vertical=0.0)
    )
    code_weight: float = 0.005
    line_share: float = 0.3
    lateral_weight: float = 1.0
    lateral_edge: float = 0.1
    code_bound: float = 4.0
    start: Start = Start.LAYERED
    rule: StepRule = LEARNT_RULE
    stopping: StoppingRule = field(default_factory=StoppingRule)
    bounds: tuple[float, float] = (-2.0, 6.0)
    static_shift_weight: float | None = None
    huber: float | None = None
    num_workers: int = 1
    order: StepOrder = StepOrder.JOINT

    def __post_init__(self) -> None:
        positive = (self.code_weight, self.lateral_edge, self.code_bound)
        if min(positive) <= 0 or self.lateral_weight < 0:
            raise InversionError(
                "need code_weight, lateral_edge and code_bound > 0 and lateral_weight >= 0"
            )
        if not 0 < self.line_share <= 1:
            raise InversionError(f"line_share={self.line_share} must be over 0, up to 1")
        if self.num_workers < 1:
            raise InversionError(f"num_workers={self.num_workers} must be at least 1")
        if self.order is StepOrder.ALTERNATING and self.static_shift_weight is not None:
            raise InversionError("static shifts are solved for in joint steps only")
        check_weights(
            bounds=self.bounds, static_shift_weight=self.static_shift_weight, huber=self.huber
        )


@dataclass(frozen=True, kw_only=True)
class CodedResult:
    """A section found with a learnt prior.

    Attributes:
        log10_rho: mesh.ground_shape.
        codes: (n_codes, num_latent).
        static_shift_log10: (2, n_rx) gains of apparent resistivity; zeros unless asked.
        result: the run itself.
    """

    log10_rho: RealArray
    codes: RealArray
    static_shift_log10: RealArray
    result: InversionResult


def invert_with_prior(
    problem: Problem,
    observations: Observations,
    *,
    section: CodedSection,
    settings: PriorInversion,
    resume: Checkpoint | None = None,
    on_step: Callable[[Checkpoint], None] = lambda _: None,
) -> CodedResult:
    """Find the section of pixels and codes that fits, as likely by the prior as the data let it.

    Args:
        problem: mesh, receivers and frequencies of the observations.
        observations: any mix of TE, TM and tipper.
        section: region and network, on the problem's mesh.
        settings: how.
        resume: where an earlier run of the same problem stood.
        on_step: called after each step.
    """
    parts = coded_parts(problem, observations, section=section, settings=settings)
    model, penalty, num_shifts = parts.model, parts.penalty, parts.num_shifts
    uniform = np.full(problem.mesh.ground_shape, settings.start_log10_rho)
    num_section, num_rx = section.num_parameters, problem.receivers.num_receivers
    bounds = (
        _limit(section, settings.bounds[0], -settings.code_bound, num_shifts),
        _limit(section, settings.bounds[1], settings.code_bound, num_shifts),
    )
    start = np.clip(np.concatenate([section.encode(uniform), np.zeros(num_shifts)]), *bounds)
    misfit = Misfit(observations=observations, huber=settings.huber)
    if settings.start is Start.LAYERED:
        start = layered_start(
            parts.layered, misfit=misfit, penalty=parts.start_penalty, start=start, bounds=bounds
        )
    rule = settings.rule
    if settings.order is StepOrder.ALTERNATING:
        rule = _alternating(section, settings, model, penalty, misfit, problem)
    result = invert(
        model,
        misfit=misfit,
        penalty=penalty,
        start=start,
        rule=rule,
        stopping=settings.stopping,
        bounds=bounds,
        resume=resume,
        on_step=on_step,
    )
    shifts = result.parameters[num_section:] if num_shifts else np.zeros(2 * num_rx)
    return CodedResult(
        log10_rho=section.log10_rho(result.parameters[:num_section]),
        codes=section.codes(result.parameters[:num_section]),
        static_shift_log10=shifts.reshape(2, num_rx),
        result=result,
    )


@dataclass(frozen=True, kw_only=True)
class CodedParts:
    """What an inversion with a learnt prior is made of.

    Attributes:
        model: pixels, codes and static shifts to data.
        layered: the same with each column alone.
        penalty: of the same parameters.
        start_penalty: for the layered start, which finds the edges: by first differences, since
            second ones let codes swing beside an edge that is not yet found.
        num_shifts: static shifts at their end.
    """

    model: DataModel
    layered: DataModel
    penalty: Penalty
    start_penalty: Penalty
    num_shifts: int


def coded_parts(
    problem: Problem,
    observations: Observations,
    *,
    section: CodedSection,
    settings: PriorInversion,
) -> CodedParts:
    """Compose the models and the penalty."""
    model: DataModel = SectionModel(
        problem=problem,
        observations=observations,
        model_map=section,
        num_workers=settings.num_workers,
    )
    layered: DataModel = LayeredModel(problem=problem, observations=observations, model_map=section)
    own = settings.code_weight
    along = CodePenalty(
        section=section,
        roughness=cell_roughness(
            problem.mesh,
            smoothness=settings.smoothness,
            inside=section.inside,
            inside_smoothness=settings.region_smoothness,
        ),
        reference_log10_rho=np.full(problem.mesh.ground_shape, settings.start_log10_rho),
        code=own * max(settings.line_share, 1 / section.num_codes),
        lateral=settings.lateral_weight,
        edge=settings.lateral_edge,
        order=2,
    )
    first = replace(along, code=own, lateral=_START_LATERAL * own, edge=_START_EDGE, order=1)
    penalties: list[Penalty] = [along, first]
    num_shifts = 0
    weight = settings.static_shift_weight
    if weight is not None:
        num_shifts = 2 * problem.receivers.num_receivers
        model = StaticShiftModel(section=model, observations=observations)
        layered = StaticShiftModel(section=layered, observations=observations)
        penalties = [
            PenaltyWithShifts(inner=penalty, num_shifts=num_shifts, weight=weight)
            for penalty in penalties
        ]
    return CodedParts(
        model=model,
        layered=layered,
        penalty=penalties[0],
        start_penalty=penalties[1],
        num_shifts=num_shifts,
    )


def _alternating(
    section: CodedSection,
    settings: PriorInversion,
    coded: DataModel,
    code_penalty: Penalty,
    misfit: Misfit,
    problem: Problem,
) -> AlternatingRule:
    pixels = pixel_map(problem.mesh)
    return AlternatingRule(
        rule=settings.rule,
        section=section,
        pixels=SectionModel(
            problem=problem,
            observations=misfit.observations,
            model_map=pixels,
            num_workers=settings.num_workers,
        ),
        pixel_penalty=RoughnessPenalty(
            matrix=roughness_matrix(
                pixels,
                thickness_m=problem.mesh.ground_thickness_m,
                width_m=problem.mesh.width_m,
                smoothness=settings.smoothness,
            ),
            reference=np.full(pixels.num_parameters, settings.start_log10_rho),
        ),
        coded=coded,
        code_penalty=code_penalty,
        misfit=misfit,
        pixel_bounds=settings.bounds,
    )


def _limit(section: CodedSection, pixels: float, codes: float, num_shifts: int) -> RealArray:
    """Give one bound of pixels, codes and static shifts (a factor 1000 of resistivity)."""
    num_pixels = len(section.pixel_cells)
    return np.concatenate(
        [
            np.full(num_pixels, pixels),
            np.full(section.num_parameters - num_pixels, codes),
            np.full(num_shifts, 3.0 * np.sign(codes)),
        ]
    )
