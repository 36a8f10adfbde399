"""`plait price`: what a training step would cost on a cluster, without its devices."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from plait.checkpoint.huggingface import load_config
from plait.cli.large_job import measured_messages, price_large_job
from plait.cli.output import say, show
from plait.config import override
from plait.cost.accelerators import CLUSTERS, find_cluster
from plait.cost.table import Table
from plait.dryrun.price_step import price_step
from plait.dryrun.report import Titled, to_json, to_text
from plait.dryrun.report_page import page
from plait.errors import ConfigError, PlanError, nearest_name
from plait.models.decoder import Decoder, DecoderConfig
from plait.plan.parallel_plan import ParallelPlan
from plait.recipes.catalog import RECIPES, find_recipe
from plait.recipes.pretrain import PRETRAIN_RECIPES
from plait.train.job import TORCH_DTYPES, Job, ProductDtype
from plait.train.optimizer import make_optimizers
from plait.train.step import summed_loss

_PLAN = "plan."


@dataclass(frozen=True, kw_only=True)
class FolderStep:
    """A training step of a model folder: settings that its config.json does not have.

    batch_size: rows of a data-parallel rank in a step. micro_batch_size: rows of one forward; 0, as
    many. dtype: of weights and arithmetic. optimizer: AdamW, or none.
    """

    batch_size: int = 1
    micro_batch_size: int = 0
    sequence_length: int = 4096
    dtype: ProductDtype = "bfloat16"
    optimizer: Literal["adamw", "none"] = "adamw"

    def __post_init__(self) -> None:
        """Check the counts."""
        if self.batch_size < 1 or self.sequence_length < 1 or self.micro_batch_size < 0:
            raise ConfigError("batch_size and sequence_length are at least 1.")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is priced: a model, the rows of one data-parallel rank, and how it learns."""

    name: str
    config: DecoderConfig
    rows: int
    tokens: int
    num_micro_batches: int
    dtype: torch.dtype
    loss: Callable[[nn.Module, Tensor], Tensor]
    optimizers: Callable[[nn.Module], list[Optimizer]] = field(repr=False)


def price_command(
    recipe: Annotated[str, typer.Argument(help="A recipe, or a model folder (its config.json).")],
    cluster: Annotated[str, typer.Option(help=", ".join(CLUSTERS))] = "h100",
    world: Annotated[
        int, typer.Option(help="Devices; 0 = as many as the plan needs. dp takes what is left.")
    ] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the recipe, or of the plan (plan.tp=8)."),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Times that plait calibrate measured on the device.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures.")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write the timeline to this file, for ui.perfetto.dev.")
    ] = None,
    nccl: Annotated[
        list[Path] | None,
        typer.Option(help="What nccl-tests measured of messages, its text or a CSV."),
    ] = None,
    dollars: Annotated[
        float | None, typer.Option(help="Price of a device and hour: what tokens cost.")
    ] = None,
) -> None:
    """Say what a training step would take, in time and memory; nothing is run.

    A recipe of `plait train` or a model folder is priced for one rank, operator by operator. A
    published model (llama3_405b, ...) is priced for the whole cluster, pipeline included. What
    does not fit the device's memory is priced too, and ends with exit code 1.

    Example: plait price llama3_405b --world 16384 --set plan.cp=2 --set plan.recompute=full
    """
    given = settings or []
    if dollars is not None and not dollars >= 0:
        raise ConfigError(f"--dollars is what a device costs in an hour, got {dollars}.")
    if recipe in PRETRAIN_RECIPES:
        price_large_job(
            recipe,
            world=world,
            cluster=cluster,
            settings=given,
            nccl=nccl or [],
            table=table,
            dollars=dollars,
            as_json=as_json,
            html=html,
            trace=trace,
        )
        return
    messages = measured_messages(nccl or [])
    plan = _plan([each for each in given if each.startswith(_PLAN)])
    step = _step(recipe, [each for each in given if not each.startswith(_PLAN)])
    plan = _filled(replace(plan, num_micro_batches=step.num_micro_batches), world)
    machine = find_cluster(cluster, plan.num_ranks)
    measured = None if table is None else Table.load(table)
    say("capturing, compiling and pricing")
    with torch.device("meta"):
        model = Decoder(step.config)
        if step.dtype is not torch.float32 and recipe not in RECIPES:
            model = model.to(step.dtype)
        tokens_BT = torch.empty((step.rows, step.tokens), dtype=torch.int64)
    optimizers = step.optimizers(model)
    found = price_step(
        model,
        [tokens_BT],
        plan,
        machine,
        loss=step.loss,
        optimizer=optimizers or None,
        table=measured,
        measured=messages,
    )
    parts = plan.dp * plan.fsdp
    titled = Titled(
        title=f"{step.name}: {step.rows} rows of {step.tokens} tokens on each of {parts} "
        f"data-parallel ranks, {plan.num_ranks} x {machine.device.name}",
        price=found,
        num_ranks=plan.num_ranks,
        tokens=step.rows * step.tokens * parts,
        dollars_per_rank_hour=dollars,
    )
    show(to_json(titled) if as_json else to_text(titled))
    if html is not None:
        html.write_text(page(titled), encoding="utf-8")
        say(f"{html}: the streams, memory over time, and what lives at its peak")
    if trace is not None:
        found.timeline.save(trace)
        say(f"{trace}: open it at ui.perfetto.dev")
    if found.memory_limit_bytes is not None and not found.fits:
        lack = found.memory.missing(found.memory_limit_bytes)
        raise PlanError(f"{step.name} does not fit {machine.device.name}: {lack}.")


def _plan(assignments: Sequence[str]) -> ParallelPlan:
    data: dict[str, Any] = {}
    for each in assignments:
        name, equals, text = each.removeprefix(_PLAN).partition("=")
        if not equals:
            raise ConfigError(f"--set {each}: expected plan.NAME=VALUE, as in plan.tp=8.")
        try:
            data[name] = json.loads(text)
        except ValueError:
            data[name] = text
    return ParallelPlan.from_json(json.dumps(data))


def _filled(plan: ParallelPlan, world: int) -> ParallelPlan:
    """The plan on that many ranks: more data-parallel ones, if it needs fewer."""
    if world < 0:
        raise ConfigError(f"--world must not be negative, got {world}.")
    if not world or world == plan.num_ranks:
        return plan
    without = plan.num_ranks // plan.dp
    if world % without or plan.dp > 1:
        fits = [n * without for n in range(1, world // without + 2)][-3:]
        raise PlanError(
            f"the plan needs {plan.num_ranks} ranks, or a multiple of {without} with more of dp, "
            f"and --world is {world}. Choose from {', '.join(map(str, fits))}, or change the plan."
        )
    return replace(plan, dp=world // without)


def _step(recipe: str, assignments: Sequence[str]) -> Step:
    if (Path(recipe) / "config.json").is_file():
        return _step_of_folder(Path(recipe), override(FolderStep(), assignments))
    if recipe not in RECIPES:
        known = nearest_name(recipe, [*RECIPES, *PRETRAIN_RECIPES])
        raise ConfigError(f"there is no recipe, model or folder {recipe!r} to price. {known}")
    job = find_recipe(recipe)
    if not isinstance(job, Job):
        raise ConfigError(
            f"{recipe} starts from a model folder: price that, plait price MODEL_FOLDER."
        )
    return _step_of_job(override(job, assignments))


def _step_of_job(job: Job) -> Step:
    """The step of `plait train`: products in the job's dtype, weights in float32."""
    num_targets, dtype = job.batch_size * job.sequence_length, job.torch_dtype

    def loss(model: Any, tokens_BT: Tensor) -> Tensor:
        return summed_loss(model, tokens_BT, tokens_BT, dtype=dtype) / num_targets

    return Step(
        name=job.name,
        config=job.model,
        rows=job.batch_size,
        tokens=job.sequence_length,
        num_micro_batches=job.batch_size // job.micro_batch_size,
        dtype=dtype,
        loss=loss,
        optimizers=lambda model: make_optimizers(model, job.optimizer),
    )


def _step_of_folder(folder: Path, settings: FolderStep) -> Step:
    rows, part = settings.batch_size, settings.micro_batch_size or settings.batch_size
    if rows % part:
        raise ConfigError(f"micro_batch_size={part} does not divide batch_size={rows}.")

    def loss(model: Any, tokens_BT: Tensor) -> Tensor:
        return model.loss(model(tokens_BT), tokens_BT) / tokens_BT.numel()

    def optimizers(model: nn.Module) -> list[Optimizer]:
        if settings.optimizer == "none":
            return []
        return [AdamW(model.parameters(), lr=1e-4, fused=True)]

    return Step(
        name=folder.name,
        config=load_config(folder),
        rows=rows,
        tokens=settings.sequence_length,
        num_micro_batches=rows // part,
        dtype=TORCH_DTYPES[settings.dtype],
        loss=loss,
        optimizers=optimizers,
    )
