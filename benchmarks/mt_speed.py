"""How long forward, Jacobian and a Gauss-Newton step take, beside SimPEG and for a long line.

    python -m benchmarks.mt_speed --json          all rows, some minutes
    python -m benchmarks.mt_speed --json --quick  the long line alone, under a minute

The long line has the size of a SAMTEX case: 20 frequencies from 100 Hz to 1e-4 Hz, TE and TM, 36
stations, 100 x 64 cells and padding. SimPEG solves the same mesh and receivers at five of the
frequencies, with each direct solver that it has here (decision 11 says how to get MUMPS and MKL
Pardiso), in turn with ours. The model is smooth and varies in both directions; its values do not
change the cost. As many threads as PyTorch has: OMP_NUM_THREADS.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import torch

from benchmarks.result import ROOT, Row, run_benchmark
from plait.magnetotellurics.earth import flat_mesh
from plait.magnetotellurics.forward_2d import Problem, make_problem, respond
from plait.magnetotellurics.jacobian import dense_sensitivity, predict
from plait.magnetotellurics.linear_step import LinearStep
from plait.magnetotellurics.model_map import pixel_map
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.regularization import Smoothness, roughness_matrix
from plait.magnetotellurics.survey import MU_0

LINE_M = 750e3
NUM_STATIONS = 36
STATIONS_M = np.linspace(10e3, LINE_M - 10e3, NUM_STATIONS)
FREQUENCIES_HZ = np.logspace(2, -4, 20)
FEW_FREQUENCIES_HZ = FREQUENCIES_HZ[::4]
ROUNDS, ENOUGH_S = 3, 20.0  # of ours and SimPEG's in turn
COMPONENTS = (
    Component.TE_LOG10_RHO,
    Component.TE_PHASE,
    Component.TM_LOG10_RHO,
    Component.TM_PHASE,
)


def long_line(frequency_hz: np.ndarray = FREQUENCIES_HZ, *, refine: float = 1.0) -> Problem:
    """100 columns over the line with 5 % on either side, 64 rows growing by 1.146, and padding.

    refine divides the sizes of columns and the growth of rows.
    """
    columns, rows = round(100 * refine), round(64 * refine)
    y = np.linspace(-0.05 * LINE_M, 1.05 * LINE_M, columns + 1)
    z = np.concatenate([[0.0], np.cumsum(2 * 1.146 ** (np.arange(rows) / refine)) / refine])
    aside = np.cumsum((y[1] - y[0]) * 1.5 ** np.arange(1, 11))
    under = np.cumsum((z[-1] - z[-2]) * 1.4 ** np.arange(1, 9))
    mesh = flat_mesh(
        y_m=np.concatenate([y[0] - aside[::-1], y, y[-1] + aside]),
        ground_z_m=np.concatenate([z, z[-1] + under]),
        air_height_m=1e6,
    )
    return make_problem(mesh, position_m=STATIONS_M, frequency_hz=frequency_hz)


def section(problem: Problem) -> np.ndarray:
    """Resistivities of 30 to 300 ohm m that vary smoothly along the line and with depth."""
    mesh = problem.mesh
    y = (mesh.y_m[1:] + mesh.y_m[:-1]) / 2
    depth = np.cumsum(mesh.ground_thickness_m)
    waves = np.sin(2 * np.pi * y / 200e3)[None, :] * np.cos(np.log(depth))[:, None]
    return 10 ** (2 + 0.5 * waves)


def log_observations(problem: Problem) -> Observations:
    """log10 rho and phase of both modes at every station and frequency."""
    f, r, c = (
        grid.ravel()
        for grid in np.meshgrid(
            np.arange(len(problem.frequency_hz)),
            np.arange(NUM_STATIONS),
            [int(c) for c in COMPONENTS],
            indexing="ij",
        )
    )
    return Observations(
        frequency_hz=problem.frequency_hz,
        position_m=STATIONS_M,
        receiver_names=tuple(f"{i:02d}" for i in range(NUM_STATIONS)),
        frequency_index=f,
        receiver_index=r,
        component=c,
        value=np.zeros(len(f)),
        error=np.full(len(f), 0.03),
    )


def timed(samples: int, run: Callable[[], object], *, warm_up: bool = True) -> list[float]:
    """Time several runs, after one that warms up where asked for."""
    if warm_up:
        run()
    durations = []
    for _ in range(samples):
        began = time.perf_counter()
        run()
        durations.append(time.perf_counter() - began)
    return durations


class OurRuns:
    """The three things that are timed, on one problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.rho = section(problem)
        self.workers = torch.get_num_threads()
        blank = log_observations(problem)
        values = predict(problem, self.rho, blank, num_workers=self.workers)
        self.observations = replace(blank, value=values)
        self.model_map = pixel_map(problem.mesh)
        self.roughness = roughness_matrix(
            self.model_map,
            thickness_m=problem.mesh.ground_thickness_m,
            width_m=problem.mesh.width_m,
            smoothness=Smoothness(),
        )

    def forward(self) -> None:
        """Compute all impedances and tippers."""
        respond(self.problem, self.rho, num_workers=self.workers)

    def jacobian(self) -> None:
        """Compute all values and the explicit Jacobian."""
        dense_sensitivity(self.problem, self.rho, self.observations, num_workers=self.workers)

    def step(self) -> None:
        """Take a step from 100 ohm m: Jacobian, linearized problem, and a judging forward run."""
        start = np.full(self.rho.shape, 100.0)
        found = dense_sensitivity(self.problem, start, self.observations, num_workers=self.workers)
        error = self.observations.error
        model = LinearStep(
            jacobian=found.jacobian / error[:, None],
            residual=(self.observations.value - found.values) / error,
            root_weight=np.ones(len(error)),
            roughness=self.roughness,
            departure=np.zeros(self.model_map.num_parameters),
            reference=np.zeros(self.model_map.num_parameters),
        ).model(10.0)
        stepped = start * 10 ** model.reshape(start.shape)
        predict(self.problem, stepped, self.observations, num_workers=self.workers)


def measure_long_line(samples: int) -> list[Row]:
    """Time what a user waits for at the size of a long line."""
    runs = OurRuns(long_line())
    shape = runs.problem.mesh.ground_shape
    size = (
        f"20 frequencies, TE+TM, {shape[1]} x {shape[0]} cells, 36 stations, {runs.workers} cores"
    )
    return [
        Row(
            claim=f"forward, {size}",
            unit="s",
            target=3,
            better="lower",
            samples=timed(samples, runs.forward),
        ),
        Row(
            claim=f"Jacobian of 2880 data, {size}",
            unit="s",
            target=None,
            better="lower",
            samples=timed(samples, runs.jacobian),
        ),
        Row(
            claim=f"Gauss-Newton step, {size}",
            unit="s",
            target=15,
            better="lower",
            samples=timed(samples, runs.step),
        ),
    ]


def measure_rival() -> list[Row]:
    """Time SimPEG with every solver it has here on the same problem, in the same run."""
    names = ("forward", "Jacobian", "Gauss-Newton step")
    if find_spec("simpeg") is None:
        return [
            Row(claim=f"{name} against SimPEG", unit="x", target=4, better="higher", full_only=True)
            for name in names
        ]
    from benchmarks import mt_speed_rival

    problem = long_line(FEW_FREQUENCIES_HZ)
    runs = OurRuns(problem)
    model = mt_speed_rival.model_of(runs.rho)
    ours = (runs.forward, runs.jacobian, runs.step)
    for run in ours:
        run()
    rows = []
    for solver_name, solver in mt_speed_rival.solvers().items():
        rival = mt_speed_rival.make_rival(problem, STATIONS_M, solver)
        observed = rival.forward(model)
        report_agreement(runs, observed, solver_name)
        start = np.full_like(model, 2.0)
        prepared = (
            lambda r=rival: partial(r.forward, model),
            lambda r=rival: partial(r.jacobian, model),
            lambda r=rival, m=start, o=observed: r.prepared_step(m, o),
        )
        for name, mine, prepare in zip(names, ours, prepared, strict=True):
            both = timed_in_turn(mine, prepare)
            medians = [statistics.median(column) for column in zip(*both, strict=True)]
            rows.append(
                Row(
                    claim=f"{name}, {len(FEW_FREQUENCIES_HZ)} frequencies: SimPEG "
                    f"{version('simpeg')} with {solver_name} ({medians[1]:.2f} s) over ours "
                    f"({medians[0]:.2f} s)",
                    unit="x",
                    target=4,
                    better="higher",
                    samples=[other / own for own, other in both],
                )
            )
            print(rows[-1].claim, flush=True)
    return rows


def timed_in_turn(
    mine: Callable[[], object], prepare: Callable[[], Callable[[], object]]
) -> list[tuple[float, float]]:
    """Time ours and what prepare gives in turn, ROUNDS times or until ENOUGH_S have gone."""
    both: list[tuple[float, float]] = []
    while len(both) < ROUNDS and sum(map(sum, both)) < ENOUGH_S:
        theirs = prepare()
        both.append((timed(1, mine, warm_up=False)[0], timed(1, theirs, warm_up=False)[0]))
    return both


def report_agreement(runs: OurRuns, theirs: list[np.ndarray], solver_name: str) -> None:
    """Stop if SimPEG's apparent resistivities are not those of the same problem.

    Both are discrete solutions on one mesh of different schemes; SimPEG averages the electric field
    over cells of different resistivity beside the receiver.
    """
    found = respond(runs.problem, runs.rho, num_workers=runs.workers)
    omega = 2 * np.pi * runs.problem.frequency_hz[:, None]
    for name, z, data in zip(
        ("TM", "TE"), (found.tm_impedance_ohm, found.te_impedance_ohm), theirs, strict=True
    ):
        mine = np.abs(z) ** 2 / (omega * MU_0)
        ratio = data.reshape(len(omega), 2, NUM_STATIONS)[:, 0] / mine
        median = float(np.median(np.abs(ratio - 1)))
        print(f"{name}: SimPEG with {solver_name} differs by {median:.1%} (median)", flush=True)
        if median > 0.1:
            raise SystemExit(f"{name}: SimPEG solves another problem")


def measure_growth() -> list[Row]:
    """Time forward runs and Jacobians against cells and frequencies, and draw both."""
    by_cells, by_frequencies = [], []
    rows = []
    for refine in (0.5, 0.7, 1.0, 1.4, 2.0):
        runs = OurRuns(long_line(FEW_FREQUENCIES_HZ, refine=refine))
        cells = int(np.prod(runs.problem.mesh.ground_shape))
        both = [timed(1, run, warm_up=False)[0] for run in (runs.forward, runs.jacobian)]
        by_cells.append((cells, *both))
        rows.append(growth_row(f"{cells} cells, 5 frequencies", both))
    for step in (10, 4, 2, 1):
        runs = OurRuns(long_line(FREQUENCIES_HZ[::step]))
        count = len(runs.problem.frequency_hz)
        both = [timed(1, run, warm_up=False)[0] for run in (runs.forward, runs.jacobian)]
        by_frequencies.append((count, *both))
        rows.append(growth_row(f"{count} frequencies, 8640 cells", both))
    draw(by_cells, by_frequencies)
    return rows


def growth_row(size: str, both: list[float]) -> Row:
    """A row without target: forward and Jacobian at one size; its value is the forward's."""
    claim = f"forward (Jacobian: {both[1]:.2f} s), TE+TM, 36 stations, {size}"
    return Row(claim=claim, unit="s", target=None, better="lower", samples=[both[0]])


def draw(by_cells: list[tuple[float, ...]], by_frequencies: list[tuple[float, ...]]) -> None:
    """Plot cost against cells and against frequencies, with lines of the expected powers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, points, label, power in zip(
        figure.subplots(1, 2),
        (by_cells, by_frequencies),
        ("cells of the ground (5 frequencies)", "frequencies (8640 cells)"),
        (1.5, 1.0),
        strict=True,
    ):
        x, forward, jacobian = (np.array(column) for column in zip(*points, strict=True))
        axes.loglog(x, jacobian, "s-", color="#b2456e", label="Jacobian")
        axes.loglog(x, forward, "o-", color="#2b6ca3", label="forward")
        line = forward[-1] * (x / x[-1]) ** power
        axes.loglog(x, line, ":", color="0.5", label=f"power {power:g}")
        axes.set_xlabel(label)
        axes.set_ylabel("s, TE+TM, 36 stations")
        axes.set_xticks(x, [f"{value:g}" for value in x], minor=False)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(ROOT / "benchmarks" / "results" / "mt_speed.png", dpi=110)


def measure(quick: bool) -> list[Row]:
    """Measure everything, or with quick the long line once."""
    if quick:
        return measure_long_line(1)
    return [*measure_rival(), *measure_long_line(3), *measure_growth()]


if __name__ == "__main__":
    run_benchmark("mt_speed", measure)
