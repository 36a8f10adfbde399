"""`plait calibrate`: measure this machine's operators, and keep their times for `plait price`."""

import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from plait.cli.output import say, show_table
from plait.compiler.compile import compile
from plait.cost.clusters import cpu
from plait.dryrun.learn import MeasuredSteps, learn_table
from plait.errors import ConfigError
from plait.executor.profile import profile_step
from plait.executor.run import run
from plait.graph.capture import capture
from plait.models.decoder import Decoder, DecoderConfig

_HEAD_SIZE, _VOCABULARY = 64, 4096


@dataclass(frozen=True)
class Size:
    """A small Llama: its width, tokens of a row, rows, and the dtype of its weights."""

    width: int
    tokens: int
    rows: int
    dtype: torch.dtype


QUICK = (Size(256, 128, 2, torch.float32),)
LADDER = tuple(
    Size(width, tokens, rows, dtype)
    for dtype in (torch.float32, torch.bfloat16)
    for width in (128, 256, 512, 1024)
    for tokens, rows in ((128, 2), (256, 4), (512, 4))
)


def calibrate_command(
    out: Annotated[Path, typer.Option(help="The table.")] = Path("calibration.json"),
    quick: Annotated[bool, typer.Option("--quick", help="One small model, in seconds.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of a rank.")] = 1,
    steps: Annotated[int, typer.Option(help="Steps of each model that are measured.")] = 5,
) -> None:
    """Measure training steps of small models on this machine, operator by operator.

    Example: plait calibrate --quick --out calibration.json
    """
    if threads < 1 or steps < 1:
        raise ConfigError(f"--threads and --steps are at least 1, got {threads} and {steps}.")
    torch.set_num_threads(threads)
    sizes = QUICK if quick else LADDER
    began_s = time.perf_counter()
    measured = list(_measured(sizes, steps))
    table = learn_table(platform.processor() or platform.machine(), cpu().device, measured)
    out.write_text(table.to_json() + "\n", encoding="utf-8")
    dtypes = {str(x).removeprefix("torch."): f for x, f in table.device.peak_flops_per_s.items()}
    show_table(
        [
            ("operators and forms", str(len(table.entries))),
            ("families", str(len(table.families))),
            ("memory bandwidth", f"{table.device.memory_bandwidth_bytes_per_s / 1e9:.2f} GB/s"),
            *(
                (f"products, {name}", f"{peak * table.device.matrix_efficiency / 1e9:.1f} GFLOP/s")
                for name, peak in dtypes.items()
                if name in {str(size.dtype).removeprefix("torch.") for size in sizes}
            ),
            ("took", f"{time.perf_counter() - began_s:.1f} s"),
        ]
    )
    say(f"{out}: give it to plait price --cluster cpu --table {out}")


def _measured(sizes: tuple[Size, ...], num_steps: int) -> Iterator[MeasuredSteps]:
    for size in sizes:
        dtype = str(size.dtype).removeprefix("torch.")
        say(f"width {size.width}, {size.rows} rows of {size.tokens} tokens, {dtype}")
        model = Decoder(_config(size)).to(size.dtype)
        tokens_BT = torch.randint(0, _VOCABULARY, (size.rows, size.tokens))
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-5, fused=True)
        graph = capture(model, tokens_BT, loss=lambda model, x: model.loss(model(x), x) / x.numel())
        schedule = compile(graph, optimizer=optimizer)
        steps_s: list[float] = []
        timelines = []
        for _ in range(2):
            run(schedule, model, tokens_BT, optimizer=optimizer)
        for _ in range(num_steps):
            start_s = time.perf_counter()
            run(schedule, model, tokens_BT, optimizer=optimizer)
            steps_s.append(time.perf_counter() - start_s)
            profiled = profile_step(schedule, model, tokens_BT, optimizer=optimizer)
            timelines.append(profiled.timeline)
        yield MeasuredSteps(schedule=schedule, timelines=timelines, steps_s=steps_s)


def _config(size: Size) -> DecoderConfig:
    heads = size.width // _HEAD_SIZE
    return DecoderConfig(
        vocab_size=_VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.width * 11 // 4,
        num_layers=2,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_size=_HEAD_SIZE,
        max_positions=size.tokens,
    )
