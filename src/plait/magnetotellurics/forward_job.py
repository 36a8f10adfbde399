"""What `plait forward` does: the responses of a section, as numbers and pictures."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from plait.errors import EarthError
from plait.magnetotellurics.file_meshes import mesh_of_modem
from plait.magnetotellurics.forward_2d import Problem, make_problem
from plait.magnetotellurics.jacobian import predict
from plait.magnetotellurics.modem_model import read_modem_model
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.profile import ProfileSettings
from plait.magnetotellurics.survey_files import read_observations

_MOST = 10_000


@dataclass(frozen=True, kw_only=True)
class ForwardJob:
    """One run of `plait forward`.

    Attributes:
        model: a ModEM 2-D model file; y is measured from its left edge.
        survey: a survey whose stations, frequencies and data are asked for; None: as below.
        num_stations: equally spaced over the columns that are at most twice the narrowest.
        num_frequencies: equally spaced in the logarithm.
        max_frequency_hz, min_frequency_hz: their ends.
        num_workers: threads.
        device: where PyTorch factorizes: "cpu" or a GPU, "cuda".
    """

    model: str
    survey: str | None = None
    num_stations: int = 20
    num_frequencies: int = 16
    max_frequency_hz: float = 100.0
    min_frequency_hz: float = 1e-3
    num_workers: int = 2
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not (1 <= self.num_stations <= _MOST and 1 <= self.num_frequencies <= _MOST):
            raise EarthError(f"num_stations and num_frequencies must be 1 to {_MOST}")
        if not 0 < self.min_frequency_hz <= self.max_frequency_hz:
            raise EarthError("need 0 < min_frequency_hz <= max_frequency_hz")


@dataclass(frozen=True, kw_only=True)
class ForwardRun:
    """The section, where it was looked at, and the responses in observations.value."""

    problem: Problem
    log10_rho: np.ndarray
    observations: Observations


def run_forward(job: ForwardJob) -> ForwardRun:
    """Read the model and compute its responses.

    Raises:
        SurveyError: a file that cannot be read.
        EarthError: stations outside the model.
    """
    model = read_modem_model(Path(job.model))
    mesh = mesh_of_modem(model)
    if job.survey is None:
        wanted = _everywhere(job, mesh.y_m, mesh.width_m)
    else:
        wanted = read_observations(job.survey, settings=ProfileSettings())
    problem = make_problem(
        mesh,
        position_m=wanted.position_m,
        frequency_hz=wanted.frequency_hz,
        device=job.device,
    )
    rho = model.resistivity_ohm_m()
    values = predict(problem, rho, wanted, num_workers=job.num_workers)
    return ForwardRun(
        problem=problem, log10_rho=np.log10(rho), observations=replace(wanted, value=values)
    )


def _everywhere(job: ForwardJob, y_m: np.ndarray, width_m: np.ndarray) -> Observations:
    core = np.flatnonzero(width_m <= 2 * width_m.min())
    core = core[(core >= 2) & (core <= len(width_m) - 3)]
    if not len(core):
        raise EarthError(
            "the model has no narrow columns for stations; name a survey with --survey"
        )
    position = np.linspace(y_m[core[0]], y_m[core[-1] + 1], job.num_stations + 2)[1:-1]
    components = [0, 1, 4, 5, 8, 9]
    f, r, c = (
        grid.ravel()
        for grid in np.meshgrid(
            range(job.num_frequencies), range(job.num_stations), components, indexing="ij"
        )
    )
    return Observations(
        frequency_hz=np.geomspace(job.max_frequency_hz, job.min_frequency_hz, job.num_frequencies),
        position_m=position,
        receiver_names=tuple(f"{number:03d}" for number in range(job.num_stations)),
        frequency_index=f,
        receiver_index=r,
        component=c,
        value=np.zeros(len(f)),
        error=np.ones(len(f)),
    )


def response_table(observations: Observations) -> str:
    """Write responses as comma-separated text: station, y, frequency, component, value."""
    kinds = [component.name for component in Component]
    lines = ["station,y_m,frequency_hz,component,value"]
    for row in range(observations.num_data):
        receiver = observations.receiver_index[row]
        name = observations.receiver_names[receiver].replace(",", "_")
        lines.append(
            f"{name},{observations.position_m[receiver]:.6g},"
            f"{observations.frequency_hz[observations.frequency_index[row]]:.8g},"
            f"{kinds[observations.component[row]]},{observations.value[row]:.10g}"
        )
    return "\n".join(lines) + "\n"
