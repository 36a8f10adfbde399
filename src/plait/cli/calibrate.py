"""`plait calibrate`: measure this machine's operators, and keep their times for `plait price`."""

import platform
import time
from collections.abc import Iterator, Sequence
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
from plait.models.registry import FAMILIES
from plait.ops.numerics import bfloat16_pays

_HEAD_SIZE, _VOCABULARY, _NUM_LAYERS = 64, 4096, 2


@dataclass(frozen=True)
class Size:
    """A small model: its width, tokens of a row, rows, dtype of its weights, and architecture."""

    width: int
    tokens: int
    rows: int
    dtype: torch.dtype
    architecture: str = "LlamaForCausalLM"


QUICK = (Size(256, 128, 2, torch.float32),)
WIDTHS = (128, 256, 512, 1024)
SHAPES = ((128, 2), (256, 4), (512, 4))
OTHER_ARCHITECTURES = ("GPT2LMHeadModel", "Gemma2ForCausalLM", "MixtralForCausalLM")
"""With operators that Llama does without: other norms, activations, caps and experts."""


def ladder(dtypes: Sequence[torch.dtype]) -> tuple[Size, ...]:
    """All models that are measured."""
    found: list[Size] = []
    for dtype in dtypes:
        found += [Size(width, *shape, dtype) for width in WIDTHS for shape in SHAPES]
        for name in OTHER_ARCHITECTURES:
            found += [Size(128, *SHAPES[0], dtype, name)]
            found += [Size(width, *SHAPES[1], dtype, name) for width in (256, 512)]
    return tuple(found)


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
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out} cannot be written: name a file in a folder that exists.")
    torch.set_num_threads(threads)
    dtypes = [torch.float32, *([torch.bfloat16] if bfloat16_pays("cpu") else [])]
    if not quick and len(dtypes) == 1:
        say("no bfloat16: this CPU emulates its products; their prices stay those of the roofline")
    sizes = QUICK if quick else ladder(dtypes)
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
        name = size.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        say(f"{name}, width {size.width}, {size.rows} rows of {size.tokens} tokens, {dtype}")
        model = Decoder(model_config(size)).to(size.dtype)
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


def model_config(size: Size) -> DecoderConfig:
    """Of a model of two layers."""
    heads = size.width // _HEAD_SIZE
    if size.architecture == "GPT2LMHeadModel":
        settings = {
            "n_embd": size.width,
            "n_layer": _NUM_LAYERS,
            "n_head": heads,
            "n_positions": size.tokens,
        }
    else:
        settings = {
            "hidden_size": size.width,
            "intermediate_size": size.width * 11 // 4,
            "num_hidden_layers": _NUM_LAYERS,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": _HEAD_SIZE,
            "max_position_embeddings": size.tokens,
        }
    if size.architecture == "MixtralForCausalLM":
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return FAMILIES[size.architecture].read_config(
        {"architectures": [size.architecture], "vocab_size": _VOCABULARY, **settings}
    )
