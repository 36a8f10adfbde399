"""`plait search`: the best plans of a large job on a cluster, and why the others are not."""

from pathlib import Path
from typing import Annotated

import typer

from plait.cli.large_job import large_cluster, large_job, measured_messages, size_of
from plait.cli.output import say, show, show_json
from plait.cli.stop import stop_on_interrupt
from plait.cost.table import Table
from plait.dryrun.job_report import search_json, search_report
from plait.dryrun.legal_plans import MICRO_BATCH_SIZES
from plait.dryrun.search import search
from plait.errors import ConfigError


def search_command(
    recipe: Annotated[str, typer.Argument(help="Published model, such as llama3_70b.")],
    world: Annotated[int, typer.Option(help="Ranks of the cluster.")],
    cluster: Annotated[str, typer.Option(help="a100, h100, h200, b200, mi300x, ...")] = "h100",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What a rank may use, such as 72GiB.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many plans to show.")] = 10,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PATH=VALUE",
            help="Change a setting; plan.tp=8 and micro_batch_size=2 are kept by every plan.",
        ),
    ] = None,
    nccl: Annotated[
        list[Path] | None,
        typer.Option(help="What nccl-tests measured of messages, its text or a CSV."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Times that plait calibrate measured on the device.")
    ] = None,
    offload: Annotated[
        bool,
        typer.Option("--offload", help="Where memory lacks, activations may wait in the host's."),
    ] = False,
    explain: Annotated[
        tuple[int, int] | None, typer.Option(metavar="A B", help="Compare two of the plans.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Search the plans of a large job: axes, micro-batches, pipeline, recompute, replicas.

    Progress goes to stderr; Ctrl-C prints the best so far.

    Example: plait search llama3_70b --world 1024 --cluster h100 --memory 72GiB --explain 1 2
    """
    if top < 1:
        raise ConfigError(f"--top must be at least 1, got {top}.")
    if explain is not None and not all(1 <= number <= top for number in explain):
        raise ConfigError(f"--explain compares two of the plans shown, 1 to {top}: {explain}.")
    measured = measured_messages(nccl or [])
    given = settings or []
    job = large_job(recipe, given)
    names = [each.partition("=")[0].strip() for each in given]
    fixed = [name.removeprefix("plan.") for name in names if name.startswith("plan.")]
    sizes = (job.micro_batch_size,) if "micro_batch_size" in names else MICRO_BATCH_SIZES
    with stop_on_interrupt("stopping after this plan") as stop:
        stop.defer()
        result = search(
            job,
            large_cluster(cluster, world),
            memory_bytes=None if memory is None else size_of(memory),
            top=top,
            micro_batch_sizes=sizes,
            fixed={name: getattr(job.plan, name) for name in fixed},
            measured=measured,
            table=None if table is None else Table.load(table),
            can_offload=offload,
            on_progress=say,
            should_stop=stop.is_set,
        )
    if as_json:
        show_json(search_json(result, explain))
        return
    show(search_report(result))
    if explain is not None:
        show()
        show(result.explain(*explain))
