"""Inversions with a learnt prior beside conventional ones, on made-up truths and on real lines.

    python -m benchmarks.mt_prior --json          all rows, about half an hour on two cores
    python -m benchmarks.mt_prior --json --quick  one seed of one truth

Both inversions of a row get the same data (from a mesh with halved cells), grid, weights (W = 1),
start in layers, step rule and stopping rule; a seed is that of the noise and of the network. Errors
are those of mt_sections.py, ratios are learnt over conventional.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import mt_sections as made
from benchmarks.result import Row, run_benchmark
from plait.magnetotellurics.coded_section import CodedSection
from plait.magnetotellurics.inversion import InversionResult, StoppingRule
from plait.magnetotellurics.layered_start import Start
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.prior_file import read_prior
from plait.magnetotellurics.prior_inversion import PriorInversion, invert_with_prior
from plait.magnetotellurics.prior_network import PriorNetwork, Training, learn_prior
from plait.magnetotellurics.smooth_inversion import SmoothInversion, invert_smoothly
from plait.magnetotellurics.step_rules import OccamRule

PRIORS = Path(__file__).parent / "priors"
WORKERS = os.cpu_count() or 1
RULE = OccamRule(max_drop=10, max_corrections=4)
STOPPING = StoppingRule(target_rms=1.05, max_steps=4, min_relative_drop=0.0)


LOW_NOISE = 0.005
NUM_SEEDS = 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """One truth, one set of modes, one noise."""

    truth: made.Truth
    modes: str
    components: tuple[Component, ...]
    noise: float

    @property
    def key(self) -> tuple[str, str]:
        """What the data without noise depend on."""
        return self.truth.name, self.modes

    @property
    def name(self) -> str:
        """Title of the rows."""
        return f"10 km, {self.truth.name}, {self.modes}, noise {100 * self.noise:g} %"


CASES = [
    Case(truth=truth, modes=modes, components=components, noise=noise)
    for noise in (LOW_NOISE, 0.03)
    for modes, components in (("TE", made.TE), ("TE+TM", made.TE_TM))
    for truth in (made.DIPPING, made.BLOCK)
]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one run reached."""

    rms: float
    residual: float
    steps: int
    base_error: float
    value_error: float


def judge(
    result: InversionResult,
    log10_rho: np.ndarray,
    layout: made.Layout,
    *,
    truth: made.Truth,
    observations: Observations,
) -> Judged:
    """Measure a section against its truth."""
    return Judged(
        rms=result.rms,
        residual=float(
            np.linalg.norm(observations.value - result.values) / np.linalg.norm(observations.value)
        ),
        steps=result.num_steps,
        base_error=made.base_error_m(layout.mesh, log10_rho, truth),
        value_error=made.value_error(layout.mesh, log10_rho, truth),
    )


def conventional(layout: made.Layout, truth: made.Truth, observations: Observations) -> Judged:
    """Run the smooth inversion."""
    found = invert_smoothly(
        layout.problem(),
        observations,
        settings=SmoothInversion(
            start=Start.LAYERED, rule=RULE, stopping=STOPPING, num_workers=WORKERS
        ),
    )
    return judge(found.result, found.log10_rho, layout, truth=truth, observations=observations)


def learnt(
    layout: made.Layout, truth: made.Truth, observations: Observations, network: PriorNetwork
) -> Judged:
    """Run the inversion with a learnt prior."""
    found = invert_with_prior(
        layout.problem(),
        observations,
        section=CodedSection(mesh=layout.mesh, region=layout.region, network=network),
        settings=PriorInversion(rule=RULE, stopping=STOPPING, num_workers=WORKERS),
    )
    return judge(found.result, found.log10_rho, layout, truth=truth, observations=observations)


def lower(claim: str, unit: str, target: float | None, samples: list[float]) -> Row:
    """Make a row whose target is an upper limit."""
    return Row(claim=claim, unit=unit, target=target, better="lower", samples=samples)


def compared(name: str, ours: list[Judged], theirs: list[Judged], *, low_noise: bool) -> list[Row]:
    """Make the rows of one truth, one set of modes and one noise; a sample for each seed."""
    rows = []
    for who, runs, gate in (("learnt", ours, True), ("conventional", theirs, False)):
        label = f"{name}, {who}"
        if low_noise:
            target = 0.0056 if gate else None
            rows.append(lower(f"{label}: |d-F|/|d|", "", target, [r.residual for r in runs]))
        target = 1.05 if gate and not low_noise else None
        rows.append(lower(f"{label}: RMS", "", target, [r.rms for r in runs]))
        steps = [float(r.steps) for r in runs]
        rows.append(lower(f"{label}: steps", "", 4 if gate else None, steps))
        rows.append(
            lower(f"{label}: lower boundary, error", "m", None, [r.base_error for r in runs])
        )
        rows.append(
            lower(
                f"{label}: log10 rho in the target, error", "", None, [r.value_error for r in runs]
            )
        )
    for what in ("base_error", "value_error"):
        title = "lower boundary" if what == "base_error" else "log10 rho in the target"
        ratios = [getattr(a, what) / getattr(b, what) for a, b in zip(ours, theirs, strict=True)]
        rows.append(lower(f"{name}: {title}, error over conventional's", "", 1 / 3, ratios))
    return rows


def prospect_rows(quick: bool) -> list[Row]:
    """The pair of 10 km x 1 km."""
    layout, fine = made.prospect(), made.prospect(refine=2)
    cases = CASES[:1] if quick else CASES
    clean = {case.key: made.clean_data(fine, case.truth, case.components) for case in cases}
    ours: dict[Case, list[Judged]] = {case: [] for case in cases}
    theirs: dict[Case, list[Judged]] = {case: [] for case in cases}
    learning = []
    for seed in range(1 if quick else NUM_SEEDS):
        network = learn_prior(
            read_prior(PRIORS / "prospect.toml"),
            layout.region.grid(layout.mesh, columns_per_code=1),
            training=Training(num_latent=8, seed=seed),
        )
        learning.append(network.learnt.duration_s)
        say(f"seed {seed}: learnt to {network.learnt.rmse:.4f} decades in {learning[-1]:.0f} s")
        for case in cases:
            observations = made.noisy(clean[case.key], share=case.noise, floor=0.005, seed=seed)
            theirs[case].append(conventional(layout, case.truth, observations))
            ours[case].append(learnt(layout, case.truth, observations, network))
            say(f"{case.name} seed {seed}: learnt {ours[case][-1]}, smooth {theirs[case][-1]}")
    rows = [lower("training of one prior, single columns", "s", 300, learning)]
    for case in cases:
        low_noise = case.noise == LOW_NOISE
        rows += compared(case.name, ours[case], theirs[case], low_noise=low_noise)
    return rows if quick else rows + wrong_rows(layout, fine)


def wrong_rows(layout: made.Layout, fine: made.Layout) -> list[Row]:
    """The same data under a prior that is deliberately wrong; no targets."""
    network = learn_prior(
        read_prior(PRIORS / "prospect_wrong.toml"),
        layout.region.grid(layout.mesh, columns_per_code=1),
        training=Training(num_latent=8),
    )
    rows = []
    for truth in (made.DIPPING, made.BLOCK):
        clean = made.clean_data(fine, truth, made.TE)
        observations = made.noisy(clean, share=0.005, floor=0.005, seed=0)
        run = learnt(layout, truth, observations, network)
        say(f"{truth.name} wrong prior: {run}")
        name = f"10 km, {truth.name}, TE, noise 0.5 %, wrong prior"
        rows += [
            lower(f"{name}: RMS", "", None, [run.rms]),
            lower(f"{name}: lower boundary, error", "m", None, [run.base_error]),
            lower(f"{name}: log10 rho in the target, error", "", None, [run.value_error]),
        ]
    return rows


def say(text: str) -> None:
    """Show progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def measure(quick: bool) -> list[Row]:
    """Run all parts, or the quick one."""
    return prospect_rows(quick)


if __name__ == "__main__":
    run_benchmark("mt_prior", measure)
