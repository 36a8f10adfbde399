"""How long forward, Jacobian and one Gauss-Newton step take at the size of a long SAMTEX line.

    python -m benchmarks.mt_speed --json          three samples of each
    python -m benchmarks.mt_speed --json --quick  one sample, under a minute

20 frequencies from 100 Hz to 1e-4 Hz, TE and TM, 36 stations, 100 x 64 cells and padding. The model
is random, which costs the same as any other. As many threads as PyTorch has: OMP_NUM_THREADS.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.result import Row, run_benchmark
from plait.magnetotellurics.earth import flat_mesh
from plait.magnetotellurics.forward_2d import Problem, make_problem, respond
from plait.magnetotellurics.jacobian import dense_sensitivity
from plait.magnetotellurics.linear_step import LinearStep
from plait.magnetotellurics.model_map import pixel_map
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.regularization import Smoothness, roughness_matrix

LINE_M = 750e3
NUM_STATIONS = 36
FREQUENCIES_HZ = np.logspace(2, -4, 20)


def samtex_problem() -> Problem:
    """100 columns over the line with 5 % on either side, 64 rows growing by 1.146, and padding."""
    y = np.linspace(-0.05 * LINE_M, 1.05 * LINE_M, 101)
    z = np.concatenate([[0.0], np.cumsum(2 * 1.146 ** np.arange(64))])
    aside = np.cumsum(8250 * 1.5 ** np.arange(1, 11))
    under = np.cumsum((z[-1] - z[-2]) * 1.4 ** np.arange(1, 9))
    mesh = flat_mesh(
        y_m=np.concatenate([y[0] - aside[::-1], y, y[-1] + aside]),
        ground_z_m=np.concatenate([z, z[-1] + under]),
        air_height_m=1e6,
    )
    stations = np.linspace(10e3, LINE_M - 10e3, NUM_STATIONS)
    return make_problem(mesh, position_m=stations, frequency_hz=FREQUENCIES_HZ)


def log_observations() -> Observations:
    """log10 rho and phase of both modes at every station and frequency."""
    components = [
        Component.TE_LOG10_RHO,
        Component.TE_PHASE,
        Component.TM_LOG10_RHO,
        Component.TM_PHASE,
    ]
    f, r, c = (
        grid.ravel()
        for grid in np.meshgrid(
            np.arange(20), np.arange(NUM_STATIONS), [int(c) for c in components], indexing="ij"
        )
    )
    return Observations(
        frequency_hz=FREQUENCIES_HZ,
        position_m=np.linspace(10e3, LINE_M - 10e3, NUM_STATIONS),
        receiver_names=tuple(f"{i:02d}" for i in range(NUM_STATIONS)),
        frequency_index=f,
        receiver_index=r,
        component=c,
        value=np.full(len(f), 1.0),
        error=np.full(len(f), 0.03),
    )


def timed(samples: int, run: Callable[[], object]) -> list[float]:
    """Time several runs after one that warms up."""
    run()
    durations = []
    for _ in range(samples):
        began = time.perf_counter()
        run()
        durations.append(time.perf_counter() - began)
    return durations


def measure(quick: bool) -> list[Row]:
    """Time the three parts; the step is the Jacobian and the solution of one linearized problem."""
    workers = torch.get_num_threads()
    problem, observations = samtex_problem(), log_observations()
    shape = problem.mesh.ground_shape
    rho = 10 ** (2 + 0.5 * np.random.default_rng(0).standard_normal(shape))
    model_map = pixel_map(problem.mesh)
    roughness = roughness_matrix(
        model_map,
        thickness_m=problem.mesh.ground_thickness_m,
        width_m=problem.mesh.width_m,
        smoothness=Smoothness(),
    )

    def step() -> None:
        found = dense_sensitivity(problem, rho, observations, num_workers=workers)
        LinearStep(
            jacobian=found.jacobian / observations.error[:, None],
            residual=(observations.value - found.values) / observations.error,
            root_weight=np.ones(observations.num_data),
            roughness=roughness,
            departure=np.zeros(model_map.num_parameters),
            reference=np.zeros(model_map.num_parameters),
        ).model(10.0)

    samples = 1 if quick else 3
    size = f"20 frequencies, TE+TM, {shape[1]} x {shape[0]} cells, 36 stations, {workers} thread"
    forward = timed(samples, lambda: respond(problem, rho, num_workers=workers))
    steps = timed(samples, step)
    return [
        Row(claim=f"forward, {size}", unit="s", target=3, better="lower", samples=forward),
        Row(claim=f"Gauss-Newton step, {size}", unit="s", target=15, better="lower", samples=steps),
    ]


if __name__ == "__main__":
    run_benchmark("mt_speed", measure)
