"""What the benchmarks of the learnt prior share: both inversions, what they reached, their rows.

Every run is kept under runs/mt_prior with a mark of the code that made it (the package, this file,
mt_sections.py, the priors), so that a benchmark that was cut goes on, and no figure is taken from
other code.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

import plait.magnetotellurics
from benchmarks import mt_sections as made
from benchmarks.result import ROOT, Row
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.coded_section import CodedSection
from plait.magnetotellurics.inversion import InversionResult, StoppingRule
from plait.magnetotellurics.layered_start import Start
from plait.magnetotellurics.observations import Observations
from plait.magnetotellurics.prior_file import read_prior
from plait.magnetotellurics.prior_inversion import PriorInversion, StepOrder, invert_with_prior
from plait.magnetotellurics.prior_network import PriorNetwork, Training, learn_prior
from plait.magnetotellurics.prior_store import load_network, save_network
from plait.magnetotellurics.smooth_inversion import SmoothInversion, invert_smoothly
from plait.magnetotellurics.step_rules import OccamRule

PRIORS = Path(__file__).parent / "priors"
WORKERS = os.cpu_count() or 1
RULE = OccamRule(max_drop=10, max_corrections=4)
STOPPING = StoppingRule(target_rms=1.05, max_steps=4, min_steps=3, min_relative_drop=0.0)
AT_ONCE = replace(STOPPING, min_steps=0)  # the first section at the target
ONE_COLUMN = Training(num_latent=8, num_hidden=64, num_steps=5000)
WHOLE_DOMAIN = Training(num_latent=24, num_sections=6000, num_steps=3000, batch_size=128)
PROVINCE_STOPPING = StoppingRule(target_rms=1.05, max_steps=8, min_steps=3)
PROVINCE_NOISE = 0.025  # of |Z|
TRAINING = Training(num_hidden=128, num_steps=5000)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What one run reached: lengths in metres, values in decades."""

    rms: float
    residual: float
    steps: int
    base_error: float
    value_error: float
    seconds: float


def say(text: str) -> None:
    """Show progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def run_folder() -> Path:
    """Give the folder of runs of exactly this code, and make it."""
    package = Path(plait.magnetotellurics.__file__).parent
    here = Path(__file__)
    sources = [*package.glob("*.py"), here, here.with_name("mt_sections.py")]
    mark = hashlib.sha256()
    for path in sorted([*sources, *PRIORS.glob("*.toml")]):
        mark.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "runs" / "mt_prior" / mark.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remembered(name: str, run: Callable[[], Judged]) -> Judged:
    """Give what this run reached before, or run it and keep it."""
    path = run_folder() / f"{name.replace(' ', '_').replace(',', '')}.json"
    if path.is_file():
        return Judged(**json.loads(path.read_text()))
    found = run()
    path.write_text(json.dumps(asdict(found)) + "\n")
    say(f"{name}: {found}")
    return found


def network_of(
    prior: str, layout: made.Layout, *, training: Training, columns_per_code: int = 1
) -> PriorNetwork:
    """Learn a prior of benchmarks/priors, or load it if this code has learnt it before."""
    folder = run_folder() / f"{prior}_{columns_per_code}_{training.seed}"
    if (folder / "prior.json").is_file():
        return load_network(folder)
    grid = layout.region.grid(layout.mesh, columns_per_code=columns_per_code)
    network = learn_prior(read_prior(PRIORS / f"{prior}.toml"), grid, training=training)
    say(f"{folder.name}: {network.learnt.rmse:.4f} decades in {network.learnt.duration_s:.0f} s")
    save_network(network, folder)
    return network


def judge(
    result: InversionResult,
    log10_rho: RealArray,
    layout: made.Layout,
    *,
    truth: made.Truth,
    observations: Observations,
) -> Judged:
    """Measure a section against its truth."""
    data = observations.value
    return Judged(
        rms=result.rms,
        residual=float(np.linalg.norm(data - result.values) / np.linalg.norm(data)),
        steps=result.num_steps,
        base_error=made.base_error_m(layout.mesh, log10_rho, truth),
        value_error=made.value_error(layout.mesh, log10_rho, truth),
        seconds=result.history[-1].duration_s,
    )


def conventional(
    layout: made.Layout, truth: made.Truth, observations: Observations, *, stopping: StoppingRule
) -> Judged:
    """Run the smooth inversion."""
    found = invert_smoothly(
        layout.problem(),
        observations,
        settings=SmoothInversion(
            start=Start.LAYERED, rule=RULE, stopping=stopping, num_workers=WORKERS
        ),
    )
    return judge(found.result, found.log10_rho, layout, truth=truth, observations=observations)


def learnt(
    layout: made.Layout,
    truth: made.Truth,
    observations: Observations,
    network: PriorNetwork,
    *,
    stopping: StoppingRule,
    order: StepOrder = StepOrder.JOINT,
) -> Judged:
    """Run the inversion with a learnt prior."""
    found = invert_with_prior(
        layout.problem(),
        observations,
        section=CodedSection(mesh=layout.mesh, region=layout.region, network=network),
        settings=PriorInversion(stopping=stopping, num_workers=WORKERS, order=order),
    )
    return judge(found.result, found.log10_rho, layout, truth=truth, observations=observations)


def lower(claim: str, unit: str, target: float | None, samples: Sequence[float]) -> Row:
    """Make a row whose target is an upper limit."""
    return Row(claim=claim, unit=unit, target=target, better="lower", samples=list(samples))
