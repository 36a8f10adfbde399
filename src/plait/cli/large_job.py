"""What `plait price` and `plait search` share: large jobs, clusters, sizes, measured messages."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from plait.cli.output import say, show, show_json
from plait.config import override
from plait.cost.accelerators import find_cluster
from plait.cost.clusters import Cluster
from plait.cost.nccl_tests import Measured, read_measured
from plait.cost.table import Table
from plait.dryrun.job_page import job_page
from plait.dryrun.job_report import job_report, pipeline_trace
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.price_job import price_job
from plait.errors import ConfigError, PlanError
from plait.recipes.pretrain import find_pretrain_recipe

_UNITS = {"": 1, "B": 1, "GB": 10**9, "MB": 10**6, "GiB": 2**30, "MiB": 2**20}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


def price_large_job(
    recipe: str,
    *,
    world: int,
    cluster: str,
    settings: Sequence[str] = (),
    memory: str | None = None,
    nccl: Sequence[Path] = (),
    table: Path | None = None,
    dollars: float | None = None,
    as_json: bool = False,
    html: Path | None = None,
    trace: Path | None = None,
) -> None:
    """Price a recipe on a whole cluster and print it. A job that does not fit is an error too.

    world: its devices; 0, as many as the plan needs.
    """
    job = large_job(recipe, settings, world or None)
    machine = large_cluster(cluster, world or job.plan.num_ranks, memory)
    times = None if table is None else Table.load(table)
    price = price_job(job, machine, measured=measured_messages(nccl), table=times)
    if as_json:
        show_json(price.to_dict(dollars))
    else:
        show(job_report(price, dollars))
    if html is not None:
        html.write_text(job_page(price, dollars), encoding="utf-8")
        say(f"{html}: the step, a layer's streams, the pipeline, memory over time, ledgers")
    if trace is not None:
        trace.write_text(json.dumps(pipeline_trace(price)), encoding="utf-8")
        say(f"{trace}: open it at ui.perfetto.dev")
    if not price.fits:
        raise PlanError(f"{job.name} does not fit {price.num_ranks} ranks: {price.missing()}.")


def measured_messages(paths: Sequence[Path]) -> list[Measured]:
    """What nccl-tests measured, of all files of --nccl."""
    return [run for path in paths for run in read_measured(path)]


def large_job(recipe: str, settings: Sequence[str], world: int | None = None) -> PretrainJob:
    """The job of a recipe with its settings; without plan.fsdp it takes the ranks that are left."""
    if world is not None:
        _check_world(world)
    job = override(find_pretrain_recipe(recipe), settings)
    if world is None or any(each.strip().startswith("plan.fsdp") for each in settings):
        return job
    rest = job.plan.num_ranks // job.plan.fsdp
    if world % rest == 0:
        job = replace(job, plan=replace(job.plan, fsdp=world // rest))
    return job


def large_cluster(name: str, world: int, memory: str | None = None) -> Cluster:
    """The cluster of that name; memory limits what a rank has."""
    _check_world(world)
    found = find_cluster(name, world)
    if memory is None:
        return found
    return replace(found, device=replace(found.device, memory_bytes=size_of(memory)))


def size_of(text: str) -> int:
    """Read a size such as 72GiB. Raises ConfigError with the known units."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"--memory {text!r} is no size. Write a number and GiB, GB, MiB or MB.")
    size = round(float(match[1]) * _UNITS[match[2]])
    if size < 1:
        raise ConfigError(f"--memory {text!r} must be above zero.")
    return size


def _check_world(world: int) -> None:
    if world < 1:
        raise ConfigError(f"--world must be at least 1, got {world}.")
