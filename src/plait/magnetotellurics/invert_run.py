"""One run of `plait invert`: the conventional section, the learnt ones, and how they differ.

The folder holds resolved.json, a state for each inversion (from which a cut run goes on), the
learnt networks with their priors, and at the end what report_page.py writes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from plait.config import to_json
from plait.errors import InversionError
from plait.magnetotellurics.arrays import BoolArray, RealArray
from plait.magnetotellurics.coded_section import CodedSection, Region
from plait.magnetotellurics.forward_2d import Problem
from plait.magnetotellurics.influence import Influence, deliberately_different, influence_of
from plait.magnetotellurics.inversion import Checkpoint, InversionResult
from plait.magnetotellurics.invert_job import (
    InvertJob,
    lay_out,
    prior_settings,
    read_data,
    shown_depth_m,
    smooth_settings,
)
from plait.magnetotellurics.observations import Observations
from plait.magnetotellurics.prior import Prior
from plait.magnetotellurics.prior_file import read_prior
from plait.magnetotellurics.prior_inversion import invert_with_prior
from plait.magnetotellurics.prior_network import PriorNetwork, learn_prior
from plait.magnetotellurics.prior_store import load_network, save_network
from plait.magnetotellurics.resolution import Resolution, coded_deviation, smooth_resolution
from plait.magnetotellurics.run_files import load_state, open_run, save_state
from plait.magnetotellurics.smooth_inversion import (
    SmoothInversion,
    SmoothSection,
    invert_smoothly,
)

_DEPARTURE_STEPS = 3  # towards the learnt section, along the target
_SAME_RMS = 1.03  # sections whose RMS differ by less than this factor fit equally well


@dataclass(frozen=True, kw_only=True)
class Found:
    """One section of a run.

    Attributes:
        title: how it was found.
        log10_rho: mesh.ground_shape.
        static_shift_log10: (2, n_rx).
        result: history, predicted values, reason to stop.
        section: the map of its pixels and codes; None for a smooth section.
        coded: the run with codes, before what they could not fit was added; None if smooth.
    """

    title: str
    log10_rho: RealArray
    static_shift_log10: RealArray
    result: InversionResult
    section: CodedSection | None = None
    coded: InversionResult | None = None


@dataclass(frozen=True, kw_only=True)
class InvertRun:
    """All that a run found.

    Attributes:
        job: its settings.
        observations: its data.
        problem: mesh and receivers.
        smooth: the conventional section, at the misfit of the learnt one where there is one.
        learnt: with the prior, one for each seed; empty without a prior.
        other: under the deliberately different prior; None without a prior.
        priors: the prior and the other one.
        resolution: of the smooth section.
        learnt_deviation: mesh.ground_shape, of the first learnt section's linearized posterior.
        region: where the prior speaks.
        influence: what came from the prior, judged by the sections that fit as well as the learnt
            one; None if none does.
    """

    job: InvertJob
    observations: Observations
    problem: Problem
    smooth: Found
    learnt: tuple[Found, ...]
    other: Found | None
    priors: tuple[Prior, ...]
    resolution: Resolution
    learnt_deviation: RealArray | None
    region: Region | None
    influence: Influence | None

    @property
    def best(self) -> Found:
        """The section to look at first."""
        return self.learnt[0] if self.learnt else self.smooth

    @property
    def other_fits(self) -> bool:
        """Whether the data allow the different prior: its RMS is as good as the learnt one's."""
        if self.other is None:
            return False
        limit = _SAME_RMS * max(self.best.result.rms, self.job.target_rms)
        return self.other.result.rms <= limit

    @property
    def ensemble_deviation(self) -> RealArray | None:
        """Standard deviation of log10 rho over the seeds, mesh.ground_shape."""
        if len(self.learnt) < 2:
            return None
        return np.std([found.log10_rho for found in self.learnt], axis=0, ddof=1)

    @property
    def in_view(self) -> BoolArray:
        """Cells of the pictures: between the first and last station, down to the shown depth."""
        mesh, stations = self.problem.mesh, self.observations.position_m
        rows = mesh.z_m[mesh.num_air : -1] < shown_depth_m(self.job, self.observations)
        columns = (mesh.y_m[1:] > stations.min()) & (mesh.y_m[:-1] < stations.max())
        return rows[:, None] & columns[None, :] & mesh.is_ground

    def share_in_view(self, chosen: BoolArray) -> float:
        """Give the share of the area in view that the cells of a mask take."""
        area = self.problem.mesh.ground_thickness_m[:, None] * self.problem.mesh.width_m
        return float((area * (chosen & self.in_view)).sum() / (area * self.in_view).sum())


Progress = Callable[[str], None]


def run_inversion(job: InvertJob, folder: Path, *, on_progress: Progress) -> InvertRun:
    """Invert a survey; a folder with a cut run of the same settings is continued.

    Raises:
        InversionError: a folder with another run, a prior that cannot be read.
        SurveyError: data that cannot be read.
    """
    priors = _priors(job)
    observations = read_data(job)
    problem = lay_out(job, observations)
    num_rows, num_columns = problem.mesh.ground_shape
    if open_run(folder, to_json(job)):
        on_progress(f"continuing the run in {folder}")
    on_progress(
        f"{observations.num_data} data, {len(observations.position_m)} stations, "
        f"{num_columns} x {num_rows} cells"
    )
    tools = _Tools(job, folder, problem, observations, on_progress)
    smooth = tools.smooth("smooth", target_rms=job.target_rms)
    learnt: list[Found] = []
    other, region = None, None
    if priors:
        region = region_of(job, problem, priors[0])
        goal = max(job.target_rms, smooth.result.rms)
        for seed in range(job.num_seeds):
            name = f"prior_{seed}"
            found = tools.learnt(name, priors[0], region, goal, seed=seed)
            if found.result.rms > _SAME_RMS * goal:
                found = tools.with_departures(name, found, smooth)
            learnt.append(found)
        other = tools.learnt("other_prior", priors[1], region, goal, seed=0)
        reached = learnt[0].result.rms
        if reached > _SAME_RMS * smooth.result.rms:
            smooth = tools.smooth("smooth_at_same_rms", target_rms=reached)
    on_progress("computing what the data resolve")
    resolution = tools.resolution(smooth)
    influence = None
    if learnt and other is not None:
        limit = _SAME_RMS * max(learnt[0].result.rms, job.target_rms)
        equals = [found for found in (smooth, other) if found.result.rms <= limit]
        if equals:
            influence = influence_of(
                learnt[0].log10_rho,
                others=[found.log10_rho for found in equals],
                deviation=resolution.deviation,
            )
    return InvertRun(
        job=job,
        observations=observations,
        problem=problem,
        smooth=smooth,
        learnt=tuple(learnt),
        other=other,
        priors=priors,
        resolution=resolution,
        learnt_deviation=tools.learnt_deviation(learnt[0]) if learnt else None,
        region=region,
        influence=influence,
    )


def region_of(job: InvertJob, problem: Problem, prior: Prior) -> Region:
    """Take the columns from half a station spacing before the line to half behind it.

    The first row is the one under the terrain, the last one lies a third below the prior's reach.

    Raises:
        InversionError: codes of several columns that do not fill the line.
    """
    mesh = problem.mesh
    stations = problem.receivers.column
    left, right = int(stations.min()), int(stations.max()) + 1
    depth = mesh.z_m[mesh.num_air :] - mesh.z_m[mesh.num_air]
    reach = job.region_depth_m or prior.reach_m() * 4 / 3
    first = int(mesh.terrain_row[left:right].max()) - mesh.num_air
    last = min(int(np.searchsorted(depth, reach)), mesh.ground_shape[0] - 1)
    if last - first < 4:
        raise InversionError(
            f"the prior reaches {reach:g} m, only {last - first} rows of the mesh; "
            "refine the mesh, or give its depths in metres"
        )
    return Region(rows=(first, last), columns=(left, right))


def _priors(job: InvertJob) -> tuple[Prior, ...]:
    if job.prior is None:
        return ()
    prior = read_prior(job.prior)
    other = read_prior(job.other_prior) if job.other_prior else deliberately_different(prior)
    return prior, other


class _Tools:
    """The two kinds of inversion with a run's settings, each with its own state file."""

    def __init__(
        self,
        job: InvertJob,
        folder: Path,
        problem: Problem,
        observations: Observations,
        on_progress: Progress,
    ) -> None:
        self._job = job
        self._folder = folder
        self._problem = problem
        self._observations = observations
        self._say = on_progress

    def smooth(self, name: str, *, target_rms: float) -> Found:
        """Run the conventional inversion."""
        found = invert_smoothly(
            self._problem,
            self._observations,
            settings=smooth_settings(self._job, target_rms=target_rms),
            resume=load_state(self._state(name)),
            on_step=self._watch(name),
        )
        return Found(
            title="smooth (conventional)",
            log10_rho=found.log10_rho,
            static_shift_log10=found.static_shift_log10,
            result=found.result,
        )

    def learnt(
        self, name: str, prior: Prior, region: Region, target_rms: float, *, seed: int
    ) -> Found:
        """Learn a prior and run the inversion with it."""
        section = CodedSection(
            mesh=self._problem.mesh,
            region=region,
            network=self._network(name, prior, region, seed),
        )
        found = invert_with_prior(
            self._problem,
            self._observations,
            section=section,
            settings=prior_settings(self._job, target_rms=target_rms),
            resume=load_state(self._state(name)),
            on_step=self._watch(name),
        )
        return Found(
            title=f"learnt prior: {prior.name}"
            + (f", seed {seed}" if self._job.num_seeds > 1 else ""),
            log10_rho=found.log10_rho,
            static_shift_log10=found.static_shift_log10,
            result=found.result,
            section=section,
            coded=found.result,
        )

    def with_departures(self, name: str, found: Found, smooth: Found) -> Found:
        """Add to a learnt section, smoothly, what the data ask for and no code of the prior has.

        Steps from the learnt section may end where it does not fit. Then they begin with the smooth
        section, which does, and go as near to the learnt one as they can at its RMS.
        """
        goal = max(self._job.target_rms, smooth.result.rms)
        settings = smooth_settings(self._job, target_rms=goal)
        added = self._departures(f"{name}_departures", found, found, settings)
        if added.result.rms > _SAME_RMS * goal:
            steps = min(_DEPARTURE_STEPS, settings.stopping.max_steps)
            stopping = replace(settings.stopping, min_steps=steps)
            settings = replace(settings, stopping=stopping)
            added = self._departures(f"{name}_from_smooth", found, smooth, settings)
        before = found.result.history
        last = before[-1]
        behind = [
            replace(
                record,
                step=record.step + last.step,
                num_forward=record.num_forward + last.num_forward,
                duration_s=record.duration_s + last.duration_s,
            )
            for record in added.result.history[1:]
        ]
        return replace(
            found,
            title=f"{found.title}, and departures from it",
            log10_rho=added.log10_rho,
            static_shift_log10=added.static_shift_log10,
            result=replace(added.result, history=(*before, *behind)),
        )

    def _departures(
        self, name: str, learnt: Found, start: Found, settings: SmoothInversion
    ) -> SmoothSection:
        return invert_smoothly(
            self._problem,
            self._observations,
            settings=settings,
            reference_log10_rho=learnt.log10_rho.ravel(),
            start_at=(start.log10_rho.ravel(), start.static_shift_log10),
            resume=load_state(self._state(name)),
            on_step=self._watch(name),
        )

    def resolution(self, found: Found) -> Resolution:
        """Say how well a smooth section is known."""
        return smooth_resolution(
            self._problem,
            self._observations,
            result=found.result,
            settings=smooth_settings(self._job, target_rms=self._job.target_rms),
        )

    def learnt_deviation(self, found: Found) -> RealArray:
        """Give the deviation of a learnt section's cells."""
        if found.section is None or found.coded is None:
            raise InversionError(f"{found.title} has no codes")
        return coded_deviation(
            self._problem,
            self._observations,
            section=found.section,
            result=found.coded,
            settings=prior_settings(self._job, target_rms=self._job.target_rms),
        )

    def _network(self, name: str, prior: Prior, region: Region, seed: int) -> PriorNetwork:
        folder = self._folder / name
        if (folder / "prior.json").is_file():
            return load_network(folder)
        per_code = self._job.columns_per_code or region.columns[1] - region.columns[0]
        grid = region.grid(self._problem.mesh, columns_per_code=per_code)
        training = replace(self._job.training, seed=self._job.training.seed + seed)
        self._say(f"{name}: learning {prior.name!r} on {grid.shape[0]} x {grid.shape[1]} cells")
        network = learn_prior(prior, grid, training=training)
        self._say(
            f"{name}: learnt to {network.learnt.rmse:.3f} decades in "
            f"{network.learnt.duration_s:.0f} s"
        )
        save_network(network, folder)
        return network

    def _state(self, name: str) -> Path:
        return self._folder / f"state_{name}.npz"

    def _watch(self, name: str) -> Callable[[Checkpoint], None]:
        def on_step(state: Checkpoint) -> None:
            save_state(self._state(name), state)
            record = state.history[-1]
            self._say(
                f"{name}: step {record.step}, rms {record.rms:.3f}, "
                f"{record.num_forward} forward runs, {record.duration_s:.0f} s"
            )

        return on_step
