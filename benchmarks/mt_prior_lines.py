"""The learnt prior on a made-up line of 750 km, and on the lines KAP03 and COPROD2."""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks import mt_sections as made
from benchmarks.mt_prior_runs import (
    ONE_COLUMN,
    PRIORS,
    PROVINCE_NOISE,
    PROVINCE_STOPPING,
    TRAINING,
    WORKERS,
    Judged,
    conventional,
    learnt,
    lower,
    network_of,
    remembered,
    run_folder,
    say,
)
from benchmarks.result import ROOT, Row
from plait.magnetotellurics.invert_job import InvertJob
from plait.magnetotellurics.invert_run import InvertRun, run_inversion
from plait.magnetotellurics.mesh_design import MeshDesign
from plait.magnetotellurics.profile import ProfileSettings
from plait.magnetotellurics.report_page import write_report
from plait.magnetotellurics.run_files import load_state

PROVINCE_SEEDS = 1
SOUTH_WEST = ("103", "106", "109", "112", "115", "118", "121", "123", "125", "127")


def province_rows(quick: bool) -> list[Row]:
    """750 km x 80 km: TE and TM, 2.5 % noise of |Z|, errors as the noise."""
    name = "750 km, TE+TM, noise 2.5 % of |Z|"
    if quick:
        claim = f"{name}, learnt: lower boundary, error"
        return [Row(claim=claim, unit="m", target=2000, better="lower", full_only=True)]
    layout = made.province()
    clean = made.clean_data(made.province(refine=2), made.CRUST, made.TE_TM)
    runs: dict[str, list[Judged]] = {"learnt": [], "conventional": [], "learnt, wrong prior": []}
    for seed in range(PROVINCE_SEEDS):
        observations = made.with_errors(clean, relative=PROVINCE_NOISE, seed=seed)
        problem = (layout, made.CRUST, observations)
        smooth = partial(conventional, *problem, stopping=PROVINCE_STOPPING)
        runs["conventional"].append(remembered(f"province seed {seed} smooth", smooth))
        for prior, title in (
            ("province", "learnt"),
            ("province_wrong", "learnt, wrong prior"),
        ):
            if seed and title != "learnt":
                continue
            training = replace(ONE_COLUMN, seed=seed)
            network = network_of(prior, layout, training=training)
            coded = partial(learnt, *problem, network, stopping=PROVINCE_STOPPING)
            runs[title].append(remembered(f"{prior} seed {seed} learnt", coded))
    rows = []
    for title, found in runs.items():
        ours = title == "learnt"
        label = f"{name}, {title}"
        base = [r.base_error for r in found]
        rows += [
            lower(f"{label}: RMS", "", 1.05 if ours else None, [r.rms for r in found]),
            lower(f"{label}: steps", "", None, [float(r.steps) for r in found]),
            lower(f"{label}: time", "s", None, [r.seconds for r in found]),
            lower(f"{label}: lower boundary, error", "m", 2000 if ours else None, base),
            lower(
                f"{label}: log10 rho in the target, error",
                "",
                None,
                [r.value_error for r in found],
            ),
        ]
    return rows


def line_rows(quick: bool) -> list[Row]:
    """KAP03's south-west part with static shifts, and COPROD2 with a prior of its sediments."""
    lines = {"KAP03, south-west part": kap03, "COPROD2": coprod2}
    if quick:
        return [
            Row(
                claim=f"{name}: RMS, learnt over smooth",
                unit="",
                target=1.03,
                better="lower",
                full_only=True,
            )
            for name in lines
        ]
    data = Path(os.environ.get("PLAIT_MT_DATA", ROOT / "../shared/data/mt"))
    if not data.is_dir():
        sys.exit(f"no survey data at {data}; set PLAIT_MT_DATA to their folder")
    rows = []
    for name, job in lines.items():
        folder = run_folder() / job.__name__
        run = run_inversion(job(data), folder, on_progress=say)
        say(f"report: {write_report(run, folder)}")
        rows += rows_of(name, run, folder)
    return rows


def kap03(data: Path) -> InvertJob:
    """Ten stations, 450 km, 25 to 17000 s, strike -45 degrees, static shifts solved for."""
    return InvertJob(
        survey=str(data / "samtex_kap03"),
        prior=str(PRIORS / "kap03.toml"),
        profile=ProfileSettings(
            strike_deg=-45.0, stations=tuple(f"kap{number}" for number in SOUTH_WEST)
        ),
        mesh=MeshDesign(
            cells_per_skin_depth=6, growth=1.16, num_pad_skin_depths=3, station_width_m=1.5e4
        ),
        training=TRAINING,
        max_resistivity_ohm_m=1000.0,
        target_rms=1.5,
        max_steps=8,
        static_shift_weight=1.0,
        max_depth_m=1e5,
        num_workers=WORKERS,
    )


def coprod2(data: Path) -> InvertJob:
    """20 stations, TE and TM, errors as given; examples/sediments.toml."""
    return InvertJob(
        survey=str(data / "coprod2" / "coprod2data.dat"),
        prior=str(ROOT / "examples" / "sediments.toml"),
        mesh=MeshDesign(
            cells_per_skin_depth=6, growth=1.2, num_pad_skin_depths=3, station_width_m=2500.0
        ),
        training=TRAINING,
        target_rms=1.3,
        max_steps=6,
        max_depth_m=6e4,
        num_workers=WORKERS,
    )


def rows_of(name: str, run: InvertRun, folder: Path) -> list[Row]:
    """RMS and steps of the three sections, and how much of the learnt one came from the prior."""
    alone = load_state(folder / "state_smooth.npz")
    if alone is None or run.other is None:
        raise AssertionError("a run with a prior leaves a smooth state and another prior's section")
    smooth = alone.history[-1]
    best, coded = run.best.result, run.best.coded or run.best.result
    claims = [
        ("RMS, learnt over smooth", best.rms / smooth.rms, "", 1.03),
        ("RMS, smooth", smooth.rms, "", None),
        ("steps, smooth", smooth.step, "", None),
        ("time, smooth", smooth.duration_s, "s", None),
        ("RMS, learnt", best.rms, "", None),
        ("RMS, learnt, codes alone", coded.rms, "", None),
        ("steps, learnt", best.num_steps, "", None),
        ("time, learnt", best.history[-1].duration_s, "s", None),
        (f"RMS, different prior ({run.priors[1].name})", run.other.result.rms, "", None),
    ]
    if run.influence is not None:
        share = 100 * run.share_in_view(run.influence.from_prior)
        claims.append(("area in view that came from the prior", share, "%", None))
    return [
        lower(f"{name}: {claim}", unit, target, [value]) for claim, value, unit, target in claims
    ]
