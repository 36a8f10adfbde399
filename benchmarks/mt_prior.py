"""Inversions with a learnt prior beside conventional ones, on made-up truths and on real lines.

    python -m benchmarks.mt_prior --json                   10 km x 1 km, half an hour on two cores
    python -m benchmarks.mt_prior --json --quick           one seed of one truth
    python -m benchmarks.mt_prior --level ways --json      a wrong prior, other steps, one code
    python -m benchmarks.mt_prior --level province --json  750 km x 80 km
    python -m benchmarks.mt_prior --level lines --json     SAMTEX KAP03 and COPROD2

Both inversions of a row get the same data (from a mesh with halved cells), grid, weights (W = 1),
start in layers and stopping rule, and Occam steps, which follow the curve of decoded sections in
the learnt one and are bounded in trade-off there; a seed is that of the noise and of the network.
Both take three steps at least: the first section at the target is the end of one linearized step,
not the smoothest or the most likely one. Since the conventional one's first section is rougher and
sometimes nearer to the truth, it is judged too. Errors are those of mt_sections.py, ratios are
learnt over the better of both conventional ones. A run that was cut goes on.
"""

from dataclasses import dataclass, field, replace
from functools import partial

from benchmarks import mt_sections as made
from benchmarks.mt_prior_lines import line_rows, province_rows
from benchmarks.mt_prior_runs import (
    AT_ONCE,
    ONE_COLUMN,
    STOPPING,
    WHOLE_DOMAIN,
    Judged,
    conventional,
    learnt,
    lower,
    network_of,
    remembered,
)
from benchmarks.result import Row, run_levels
from plait.magnetotellurics.inversion import StoppingRule
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.prior_inversion import StepOrder
from plait.magnetotellurics.prior_network import PriorNetwork

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
    def name(self) -> str:
        """Title of the rows."""
        return f"10 km, {self.truth.name}, {self.modes}, noise {100 * self.noise:g} %"


CASES = [
    Case(truth=truth, modes=modes, components=components, noise=noise)
    for noise in (LOW_NOISE, 0.03)
    for modes, components in (("TE", made.TE), ("TE+TM", made.TE_TM))
    for truth in (made.DIPPING, made.BLOCK)
]


class Noisy:
    """The data of the cases; those without noise are computed once for each truth and modes."""

    def __init__(self) -> None:
        self._clean: dict[tuple[str, str], Observations] = {}

    def data(self, case: Case, seed: int) -> Observations:
        """Give one case's data with the noise of one seed."""
        key = (case.truth.name, case.modes)
        if key not in self._clean:
            fine = made.prospect(refine=2)
            self._clean[key] = made.clean_data(fine, case.truth, case.components)
        return made.noisy(self._clean[key], share=case.noise, floor=0.005, seed=seed)


@dataclass(kw_only=True)
class Sides:
    """What was reached in one case, by seed; first: the conventional one stopped at once."""

    ours: list[Judged] = field(default_factory=list)
    theirs: list[Judged] = field(default_factory=list)
    first: list[Judged] = field(default_factory=list)


def compared(name: str, sides: Sides, *, low_noise: bool) -> list[Row]:
    """Make the rows of one truth, one set of modes and one noise; a sample for each seed."""
    rows = []
    for who, runs, gate in (
        ("learnt", sides.ours, True),
        ("conventional", sides.theirs, False),
        ("conventional, first at the target", sides.first, False),
    ):
        label = f"{name}, {who}"
        if low_noise:
            target = 0.0056 if gate else None
            rows.append(lower(f"{label}: |d-F|/|d|", "", target, [r.residual for r in runs]))
        target = 1.05 if gate and not low_noise else None
        rows.append(lower(f"{label}: RMS", "", target, [r.rms for r in runs]))
        steps = [float(r.steps) for r in runs]
        rows.append(lower(f"{label}: steps", "", 4 if gate else None, steps))
        rows += errors(label, runs)
    for what in ("base_error", "value_error"):
        title = "lower boundary" if what == "base_error" else "log10 rho in the target"
        ratios = [
            getattr(a, what) / min(getattr(b, what), getattr(c, what))
            for a, b, c in zip(sides.ours, sides.theirs, sides.first, strict=True)
        ]
        rows.append(lower(f"{name}: {title}, error over conventional's", "", 1 / 3, ratios))
    return rows


def errors(label: str, runs: list[Judged]) -> list[Row]:
    """Make the two rows of a section's errors."""
    return [
        lower(f"{label}: lower boundary, error", "m", None, [r.base_error for r in runs]),
        lower(f"{label}: log10 rho in the target, error", "", None, [r.value_error for r in runs]),
    ]


def prospect_rows(quick: bool) -> list[Row]:
    """The pair of 10 km x 1 km."""
    layout, noisy = made.prospect(), Noisy()
    cases = CASES[:1] if quick else CASES
    sides = {case: Sides() for case in cases}
    learning = []
    for seed in range(1 if quick else NUM_SEEDS):
        network = network_of("prospect", layout, training=replace(ONE_COLUMN, seed=seed))
        learning.append(network.learnt.duration_s)
        for case in cases:
            name = f"{case.name} seed {seed}"
            smooth = partial(run, layout, case, noisy, seed)
            sides[case].theirs.append(remembered(f"{name} smooth", smooth))
            at_once = partial(smooth, stopping=AT_ONCE)
            sides[case].first.append(remembered(f"{name} smooth at once", at_once))
            coded = partial(smooth, network=network)
            sides[case].ours.append(remembered(f"{name} learnt", coded))
    rows = [lower("training of one prior, single columns", "s", 300, learning)]
    for case in cases:
        rows += compared(case.name, sides[case], low_noise=case.noise == LOW_NOISE)
    return rows


def run(
    layout: made.Layout,
    case: Case,
    noisy: Noisy,
    seed: int,
    network: PriorNetwork | None = None,
    order: StepOrder = StepOrder.JOINT,
    stopping: StoppingRule = STOPPING,
) -> Judged:
    """Run one inversion of a case, without or with a learnt prior."""
    problem = (layout, case.truth, noisy.data(case, seed))
    if network is None:
        return conventional(*problem, stopping=stopping)
    return learnt(*problem, network, stopping=stopping, order=order)


def other_ways(quick: bool) -> list[Row]:
    """The first two cases under a wrong prior, in alternating steps, and with one code for all.

    One seed, no targets.
    """
    if quick:
        claim = f"{CASES[0].name}, wrong prior: RMS"
        return [Row(claim=claim, unit="", target=None, better="lower", full_only=True)]
    layout, noisy = made.prospect(), Noisy()
    columns = layout.region.columns[1] - layout.region.columns[0]
    rows = []
    for title, prior, training, per_code, order in (
        ("wrong prior", "prospect_wrong", ONE_COLUMN, 1, StepOrder.JOINT),
        ("alternating steps", "prospect", ONE_COLUMN, 1, StepOrder.ALTERNATING),
        ("one code for all columns", "prospect", WHOLE_DOMAIN, columns, StepOrder.JOINT),
    ):
        network = network_of(prior, layout, training=training, columns_per_code=per_code)
        for case in CASES[:2]:
            label = f"{case.name}, {title}"
            found = remembered(label, partial(run, layout, case, noisy, 0, network, order))
            rows.append(lower(f"{label}: RMS", "", None, [found.rms]))
            rows.append(lower(f"{label}: steps", "", None, [float(found.steps)]))
            rows += errors(label, [found])
    return rows


if __name__ == "__main__":
    run_levels(
        "mt_prior",
        {
            "prospect": prospect_rows,
            "ways": other_ways,
            "province": province_rows,
            "lines": line_rows,
        },
    )
