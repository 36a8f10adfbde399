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
from plait.cost.accelerators import cluster_of_gpu, find_cluster
from plait.cost.clusters import Device, cpu
from plait.dryrun.learn import MeasuredSteps, learn_table
from plait.errors import ConfigError, nearest_name
from plait.executor.profile import profile_step
from plait.executor.run import run
from plait.graph.capture import capture
from plait.models.decoder import Decoder, DecoderConfig
from plait.models.registry import FAMILIES
from plait.ops.numerics import bfloat16_pays
from plait.plan.parallel_plan import ParallelPlan

_NUM_LAYERS = 2
_MICRO_BATCHES = 4


@dataclass(frozen=True)
class Size:
    """A small model: its width, tokens of a row, rows, dtype of its weights, and architecture."""

    width: int
    tokens: int
    rows: int
    dtype: torch.dtype
    architecture: str = "LlamaForCausalLM"
    head_size: int = 64
    vocabulary: int = 4096
    micro_batches: int = 1


@dataclass(frozen=True, kw_only=True)
class Ladder:
    """What is measured on a kind of device: Llamas of all widths and shapes (tokens, rows).

    quick: the one model of a quick run.
    """

    widths: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    head_size: int
    vocabulary: int
    quick: Size

    def sizes(self, dtypes: Sequence[torch.dtype]) -> tuple[Size, ...]:
        """All models that are measured."""
        small, middle, *_ = self.shapes
        found: list[Size] = []
        for dtype in dtypes:
            found += [
                Size(width, *shape, dtype, head_size=self.head_size, vocabulary=self.vocabulary)
                for width in self.widths
                for shape in self.shapes
            ]
            found += [
                Size(width, *shape, dtype, name, self.head_size, self.vocabulary)
                for name in OTHER_ARCHITECTURES
                for width, shape in zip(self.widths, (small, middle, middle), strict=False)
            ]
            tokens, rows = small
            found += [  # what operators take behind a first micro-batch
                Size(
                    width,
                    tokens,
                    _MICRO_BATCHES * rows,
                    dtype,
                    head_size=self.head_size,
                    vocabulary=self.vocabulary,
                    micro_batches=_MICRO_BATCHES,
                )
                for width in self.widths[:3]
            ]
        return tuple(found)


LADDERS = {
    "cpu": Ladder(
        widths=(128, 256, 512, 1024),
        shapes=((128, 2), (256, 4), (512, 4)),
        head_size=64,
        vocabulary=4096,
        quick=Size(256, 128, 2, torch.float32),
    ),
    "cuda": Ladder(
        widths=(512, 1024, 2048, 4096),
        shapes=((512, 2), (1024, 4), (2048, 4)),
        head_size=128,
        vocabulary=32768,
        quick=Size(1024, 512, 2, torch.bfloat16, head_size=128),
    ),
}
"""By the device's type. A GPU is busy with larger models only."""
OTHER_ARCHITECTURES = ("GPT2LMHeadModel", "Gemma2ForCausalLM", "MixtralForCausalLM")
"""With operators that Llama does without: other norms, activations, caps and experts."""


def calibrate_command(
    out: Annotated[Path, typer.Option(help="The table.")] = Path("calibration.json"),
    device: Annotated[str, typer.Option(help="What is measured: cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="One small model, in seconds.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of a rank.")] = 1,
    steps: Annotated[int, typer.Option(help="Steps of each model that are measured.")] = 5,
) -> None:
    """Measure training steps of small models on this machine, operator by operator.

    On a GPU (--device cuda) the table is for the cluster that has such GPUs.

    Example: plait calibrate --quick --out calibration.json
    """
    if threads < 1 or steps < 1:
        raise ConfigError(f"--threads and --steps are at least 1, got {threads} and {steps}.")
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out} cannot be written: name a file in a folder that exists.")
    machine, assumed = _machine(device)
    torch.set_num_threads(threads)
    dtypes = [torch.float32, *([torch.bfloat16] if bfloat16_pays(device) else [])]
    if not quick and len(dtypes) == 1:
        say("no bfloat16: this CPU emulates its products; their prices stay those of the roofline")
    ladder = LADDERS[device]
    sizes = (ladder.quick,) if quick else ladder.sizes(dtypes)
    began_s = time.perf_counter()
    measured = list(_measured(sizes, steps, device))
    table = learn_table(machine, assumed, measured)
    out.write_text(table.to_json() + "\n", encoding="utf-8")
    peaks = {str(x).removeprefix("torch."): f for x, f in table.device.peak_flops_per_s.items()}
    show_table(
        [
            ("operators and forms", str(len(table.entries))),
            ("families", str(len(table.families))),
            ("memory bandwidth", f"{table.device.memory_bandwidth_bytes_per_s / 1e9:.2f} GB/s"),
            *(
                (f"products, {name}", f"{peak * table.device.matrix_efficiency / 1e9:.1f} GFLOP/s")
                for name, peak in peaks.items()
                if name in {str(size.dtype).removeprefix("torch.") for size in sizes}
            ),
            ("took", f"{time.perf_counter() - began_s:.1f} s"),
        ]
    )
    say(f"{out}: give it to plait price --cluster {table.device.name} --table {out}")


def _machine(device: str) -> tuple[str, Device]:
    """The name of what is measured, and what is assumed of it."""
    if device not in LADDERS:
        raise ConfigError(
            f"there is no device {device!r} to measure. {nearest_name(device, LADDERS)}"
        )
    if device == "cpu":
        return platform.processor() or platform.machine(), cpu().device
    if not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: PyTorch sees no GPU on this machine. Calibrate where there is one, "
            "with a PyTorch that is built for it, or take --device cpu."
        )
    name = torch.cuda.get_device_name()
    return name, find_cluster(cluster_of_gpu(name), 1).device


def _measured(sizes: tuple[Size, ...], num_steps: int, device: str) -> Iterator[MeasuredSteps]:
    for size in sizes:
        dtype = str(size.dtype).removeprefix("torch.")
        name = size.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        parts = f" in {size.micro_batches} micro-batches" if size.micro_batches > 1 else ""
        say(f"{name}, width {size.width}, {size.rows} rows of {size.tokens} tokens{parts}, {dtype}")
        model = Decoder(model_config(size)).to(device, size.dtype)
        tokens_BT = torch.randint(0, size.vocabulary, (size.rows, size.tokens), device=device)
        optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-5, fused=True)
        plan = ParallelPlan(num_micro_batches=size.micro_batches)
        graph = capture(
            model, tokens_BT, plan, loss=lambda model, x: model.loss(model(x), x) / x.numel()
        )
        schedule = compile(graph, plan, optimizer=optimizer)
        steps_s: list[float] = []
        timelines = []
        for _ in range(2):
            run(schedule, model, tokens_BT, optimizer=optimizer)
        for _ in range(num_steps):
            start_s = _now_s(device)
            run(schedule, model, tokens_BT, optimizer=optimizer)
            steps_s.append(_now_s(device) - start_s)
            profiled = profile_step(schedule, model, tokens_BT, optimizer=optimizer)
            timelines.append(profiled.timeline)
        yield MeasuredSteps(schedule=schedule, timelines=timelines, steps_s=steps_s)


def _now_s(device: str) -> float:
    """The time when the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def model_config(size: Size) -> DecoderConfig:
    """Of a model of two layers."""
    heads = size.width // size.head_size
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
            "head_dim": size.head_size,
            "max_position_embeddings": size.tokens,
        }
    if size.architecture == "MixtralForCausalLM":
        settings |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    return FAMILIES[size.architecture].read_config(
        {"architectures": [size.architecture], "vocab_size": size.vocabulary, **settings}
    )
