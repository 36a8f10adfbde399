"""Settings of `plait invert`: what to read, how to grade the mesh, when to stop."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.data_choice import DataChoice, chosen_data
from plait.magnetotellurics.forward_2d import Problem, make_problem
from plait.magnetotellurics.inversion import StoppingRule
from plait.magnetotellurics.layered_start import Start
from plait.magnetotellurics.mesh_design import MeshDesign, mesh_from_skin_depths
from plait.magnetotellurics.observations import Component, Observations, with_error_floor
from plait.magnetotellurics.prior_inversion import PriorInversion, StepOrder
from plait.magnetotellurics.prior_network import Training
from plait.magnetotellurics.profile import ProfileSettings
from plait.magnetotellurics.smooth_inversion import SmoothInversion
from plait.magnetotellurics.step_rules import OccamRule
from plait.magnetotellurics.survey_files import read_observations


@dataclass(frozen=True, kw_only=True)
class InvertJob:
    """One run of `plait invert`.

    Attributes:
        survey: a data file, or a folder of stations.
        prior: a TOML file, or None for a conventional inversion only.
        other_prior: a second one, deliberately different; None makes the layers of the first
            thicker than it allows.
        profile: strike, modes and floors of a folder of stations.
        data: frequencies, stations and points that are taken.
        log10_rho_floor: errors of log10 rho are raised to this.
        phase_floor_rad: errors of phases are raised to this.
        mesh: grading.
        min_resistivity_ohm_m, max_resistivity_ohm_m: expected in the ground, for the mesh.
        start_log10_rho: of the half-space at the beginning, and the reference.
        start: "layered" fits each column alone first.
        min_log10_rho, max_log10_rho: bounds of every section.
        target_rms: where all inversions stop.
        max_steps: of each inversion.
        min_steps: taken even where the target is reached before. The first section at the target is
            the end of one linearized step; later ones are smoother, or more likely by the prior.
        static_shift_weight: None, or the penalty on (log10 gain)^2 of each station and mode.
        huber: None, or the residual in errors beyond which data count less.
        order: pixels and codes in one "joint" step, or "alternating".
        columns_per_code: of a sub-region; 0 gives the whole region one code.
        region_depth_m: how deep the prior speaks; None: a third deeper than its deepest interface.
        training: of the network.
        num_seeds: networks in the ensemble; the first one's section is the result.
        max_depth_m: of the pictures; None: from the data.
        num_workers: threads.
        device: where PyTorch factorizes: "cpu" or a GPU, "cuda".
    """

    survey: str
    prior: str | None = None
    other_prior: str | None = None
    profile: ProfileSettings = field(default_factory=ProfileSettings)
    data: DataChoice = field(default_factory=DataChoice)
    log10_rho_floor: float = 0.0
    phase_floor_rad: float = 0.0
    mesh: MeshDesign = field(
        default_factory=lambda: MeshDesign(
            cells_per_skin_depth=6, growth=1.2, num_pad_skin_depths=3
        )
    )
    min_resistivity_ohm_m: float = 2.0
    max_resistivity_ohm_m: float = 300.0
    start_log10_rho: float = 1.5
    start: Literal["layered", "uniform"] = "layered"
    min_log10_rho: float = -2.0
    max_log10_rho: float = 6.0
    target_rms: float = 1.0
    max_steps: int = 12
    min_steps: int = 3
    static_shift_weight: float | None = None
    huber: float | None = None
    order: Literal["joint", "alternating"] = "joint"
    columns_per_code: int = 1
    region_depth_m: float | None = None
    training: Training = field(default_factory=Training)
    num_seeds: int = 1
    max_depth_m: float | None = None
    num_workers: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.num_seeds < 1 or self.num_seeds > 100:
            raise InversionError(f"num_seeds={self.num_seeds} must be 1 to 100")
        if self.columns_per_code < 0:
            raise InversionError("columns_per_code must be positive, or 0 for one code")
        if self.other_prior and not self.prior:
            raise InversionError("other_prior needs a prior to differ from")
        if self.order == "alternating" and self.static_shift_weight is not None:
            raise InversionError(
                "static shifts are solved for in joint steps only; set order=joint"
            )
        low, high = self.min_log10_rho, self.max_log10_rho
        if not low <= self.start_log10_rho <= high:
            raise InversionError(
                f"start_log10_rho={self.start_log10_rho} lies outside min_log10_rho={low} to "
                f"max_log10_rho={high}"
            )
        # Both check themselves: a job that cannot run must not leave a folder behind.
        smooth_settings(self, target_rms=self.target_rms)
        prior_settings(self, target_rms=self.target_rms)


def smooth_settings(job: InvertJob, *, target_rms: float) -> SmoothInversion:
    """Give the settings of the conventional inversion."""
    return SmoothInversion(
        start_log10_rho=job.start_log10_rho,
        start=Start(job.start),
        rule=OccamRule(max_drop=10, max_corrections=4),
        stopping=_stopping(job, target_rms),
        bounds=(job.min_log10_rho, job.max_log10_rho),
        static_shift_weight=job.static_shift_weight,
        huber=job.huber,
        num_workers=job.num_workers,
    )


def prior_settings(job: InvertJob, *, target_rms: float) -> PriorInversion:
    """Give the settings of the inversion with a learnt prior."""
    return PriorInversion(
        start_log10_rho=job.start_log10_rho,
        start=Start(job.start),
        stopping=_stopping(job, target_rms),
        bounds=(job.min_log10_rho, job.max_log10_rho),
        static_shift_weight=job.static_shift_weight,
        huber=job.huber,
        num_workers=job.num_workers,
        order=StepOrder(job.order),
    )


def _stopping(job: InvertJob, target_rms: float) -> StoppingRule:
    least = min(job.min_steps, job.max_steps)
    return StoppingRule(target_rms=target_rms, max_steps=job.max_steps, min_steps=least)


def read_data(job: InvertJob) -> Observations:
    """Read the survey, leave out what is not asked for, raise its errors to the floors."""
    read = read_observations(job.survey, settings=job.profile)
    observations = chosen_data(read, job.data)
    if job.log10_rho_floor > 0 or job.phase_floor_rad > 0:
        observations = with_error_floor(
            observations, log10_rho=job.log10_rho_floor, phase_rad=job.phase_floor_rad
        )
    return observations


def lay_out(job: InvertJob, observations: Observations) -> Problem:
    """Grade the mesh for the data and place the receivers."""
    mesh = mesh_from_skin_depths(
        observations.position_m,
        frequency_hz=observations.frequency_hz,
        min_resistivity_ohm_m=job.min_resistivity_ohm_m,
        max_resistivity_ohm_m=job.max_resistivity_ohm_m,
        design=job.mesh,
    )
    return make_problem(
        mesh,
        position_m=observations.position_m,
        frequency_hz=observations.frequency_hz,
        device=job.device,
    )


def shown_depth_m(job: InvertJob, observations: Observations) -> float:
    """Depth of the pictures: two penetration depths [Schmucker 1970] of the longest period."""
    if job.max_depth_m is not None:
        return job.max_depth_m
    longest = int(np.argmin(observations.frequency_hz))
    is_log_rho = np.isin(observations.component, (Component.TE_LOG10_RHO, Component.TM_LOG10_RHO))
    log_rho = (observations.frequency_index == longest) & is_log_rho
    level = float(np.median(observations.value[log_rho])) if log_rho.any() else job.start_log10_rho
    return 2 * 356 * float(np.sqrt(10**level / observations.frequency_hz.min()))
