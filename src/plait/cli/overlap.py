"""`plait overlap`: how much tensor-parallel communication replicas hide, measured here."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from torch import Tensor

from plait.checkpoint.huggingface import load_config
from plait.cli.output import say, show
from plait.cost.clusters import Link
from plait.cost.overlap_picture import direction_picture, page
from plait.errors import ConfigError, nearest_name
from plait.executor.host_memory import keep_freed_memory
from plait.executor.measure_overlap import Meter
from plait.executor.overlap_forms import CANDIDATES
from plait.graph.capture import capture
from plait.graph.graph import Graph
from plait.models.decoder import Decoder, DecoderConfig
from plait.plan.parallel_plan import ParallelPlan

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DEFAULT_RATIO = 0.5
_HEAD_SIZE, _VOCABULARY = 64, 512
_Name = TypeVar("_Name", str, str | None)


def overlap_command(
    model: Annotated[
        Path | None,
        typer.Argument(help="Model folder (its config.json is read); default a small Llama."),
    ] = None,
    width: Annotated[int, typer.Option(help="Of the small Llama, a multiple of 64.")] = 512,
    layers: Annotated[int, typer.Option(help="Of the small Llama.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of a row.")] = 1024,
    batch: Annotated[int, typer.Option(help="Rows of this rank.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    tp: Annotated[int, typer.Option(help="Ranks that share each product.")] = 4,
    sp: Annotated[bool, typer.Option("--sp", help="Share the tokens between products.")] = False,
    replicas: Annotated[
        str, typer.Option(metavar="auto|1..4", help="Parts of the tokens.")
    ] = "auto",
    axis: Annotated[
        str | None, typer.Option(metavar="token|batch", help="What is split; default what fits.")
    ] = None,
    causal_split: Annotated[
        bool, typer.Option("--causal-split", help="Split causal attention too, to rounding.")
    ] = False,
    ratio: Annotated[
        float | None,
        typer.Option(help="Communication over compute, which sets the link; default 0.5."),
    ] = None,
    latency: Annotated[float | None, typer.Option(help="Of the link, in seconds.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Of the link, in bytes per second.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of this rank.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds in which all runs take turns.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write the runs to this file, for ui.perfetto.dev.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the picture.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the picture of the forward.")] = None,
) -> None:
    """Measure what share of tensor-parallel communication replicas hide, forward and backward.

    Runs a training step unsplit, split, and split and ordered, each also with free communication.
    Messages take the time of a link, and are not sent: one process stands for all ranks.

    Example: plait overlap --width 1024 --tp 4 --replicas 4 --html overlap.html
    """
    if batch < 1 or tokens < 1:
        raise ConfigError(f"--batch and --tokens must be at least 1, got {batch} and {tokens}.")
    config = _small(width, layers, tokens) if model is None else load_config(model)
    meter = Meter(
        name=f"Llama, width {width}, {layers} layers" if model is None else model.name,
        vocab_size=config.vocab_size,
        replicas=_count_of(replicas),
        axis=_known(axis, "axis", ("token", "batch")),
        causal_split=causal_split,
        link=_link(ratio, latency, bandwidth),
        ratio=_DEFAULT_RATIO if ratio is None else ratio,
        num_rounds=rounds,
    )
    if threads < 1:
        raise ConfigError(f"--threads must be at least 1, got {threads}.")
    torch.set_num_threads(threads)
    keep_freed_memory()  # else what is alive at a time would be in the times, on a CPU alone
    plan = ParallelPlan(tp=tp, sp=sp, replicas=meter.replicas, causal_split=causal_split)
    say("capturing")
    graph = _captured(config, (batch, tokens), _DTYPES[_known(dtype, "dtype", _DTYPES)], plan)
    report = meter.measure(graph, on_stage=say)
    show(report.to_json() if as_json else str(report))
    if trace is not None:
        trace.write_text(json.dumps(report.to_chrome_trace()), encoding="utf-8")
        say(f"{trace}: open it at ui.perfetto.dev")
    if html is not None:
        html.write_text(page(report), encoding="utf-8")
        say(f"{html}: the two streams of each run")
    if svg is not None:
        svg.write_text(direction_picture(report, "forward"), encoding="utf-8")
        say(f"{svg}: the two streams of the forward")


def _small(width: int, layers: int, tokens: int) -> DecoderConfig:
    """Shapes of Llama 3: heads of 64, half as many for keys and values, an MLP of 11/4 the width.

    The vocabulary is small, so that a few layers are most of the step.
    """
    if width < 1 or width % _HEAD_SIZE:
        raise ConfigError(f"--width must be a multiple of {_HEAD_SIZE}, got {width}.")
    num_heads = width // _HEAD_SIZE
    return DecoderConfig(
        vocab_size=_VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_heads // 2 if num_heads % 2 == 0 else num_heads,
        head_size=_HEAD_SIZE,
        max_positions=tokens,
    )


def _captured(
    config: DecoderConfig, shape: tuple[int, int], dtype: torch.dtype, plan: ParallelPlan
) -> Graph:
    if shape[1] > config.max_positions:
        raise ConfigError(f"--tokens {shape[1]}: the model has {config.max_positions} positions.")
    with torch.device("meta"):
        model = Decoder(config).to(dtype)
        tokens_BT = torch.empty(shape, dtype=torch.int64)
    # However many replicas there will be, the graph is cut where replicas want it.
    return capture(model, tokens_BT, replace(plan, replicas="auto"), loss=_loss)


def _loss(model: Decoder, tokens_BT: Tensor) -> Tensor:
    return model.loss(model(tokens_BT), tokens_BT) / tokens_BT.numel()


def _known(given: _Name, what: str, names: Iterable[str]) -> _Name:
    if given is not None and given not in names:
        raise ConfigError(f"--{what} {given!r} is not known. {nearest_name(given, names)}")
    return given


def _count_of(replicas: str) -> int | str:
    if replicas == "auto":
        return replicas
    if replicas.isdigit() and int(replicas) in CANDIDATES:
        return int(replicas)
    raise ConfigError(f"--replicas must be auto or a number from 1 to 4, got {replicas!r}.")


def _link(ratio: float | None, latency: float | None, bandwidth: float | None) -> Link | None:
    if latency is None and bandwidth is None:
        return None
    if ratio is not None:
        raise ConfigError("--ratio sets the link, and so do --latency and --bandwidth: give one.")
    if latency is None or bandwidth is None:
        raise ConfigError("--latency and --bandwidth describe the link together: give both.")
    return Link(latency_s=latency, bandwidth_bytes_per_s=bandwidth)
