"""What replicas hide on one GPU, with emulated collectives that occupy multiprocessors and memory.

Rank 0's own program of a few Llama 70B layers (tp=8, bfloat16, 8,192 tokens) runs on this GPU; its
messages run on a side stream (`executor/emulated_process_group.py`), each for the time that the
cost model gives it at 350 GB/s, on 0 to 24 multiprocessors. Nothing is sent: no figure of this is
one of several GPUs.

    python -m benchmarks.overlap_emulated [--quick]
"""

from typing import Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.result import Row, default_dtype, run_benchmark
from plait.cost.clusters import Link, h200
from plait.errors import PlanError
from plait.executor.delayed_process_group import registered
from plait.executor.emulated_process_group import EmulatedProcessGroup
from plait.executor.overlap_forms import DIRECTIONS, Forms, forms_of, prepared, unordered
from plait.executor.run import Runnable
from plait.executor.timed_rounds import (
    FREE,
    example_inputs,
    measure_rounds,
    net_hidden,
    timed_step,
    with_twin,
)
from plait.graph.capture import capture
from plait.graph.graph import Graph
from plait.models.decoder import Decoder, DecoderConfig
from plait.plan.parallel_plan import ParallelPlan

TP = 8
LINK = Link(latency_s=5e-6, bandwidth_bytes_per_s=350e9)
BLOCKS = (0, 2, 8, 24)
REPLICAS = (2, 3, 4)
ROUNDS = 5
VOCABULARY = 512


def measure(quick: bool) -> list[Row]:
    """Measure each number of replicas with each number of multiprocessors."""
    graph = _captured(quick)
    base = unordered(graph)
    inputs = example_inputs(base, vocab_size=VOCABULARY)
    cluster = h200(TP)
    forms: list[Forms] = []
    for number in REPLICAS[:1] if quick else REPLICAS:
        try:
            forms.append(forms_of(graph, number, cluster))
        except PlanError as error:
            print(error)
    rows: list[Row] = []
    for num_blocks in BLOCKS[:1] if quick else BLOCKS:
        rows += _rows(base, forms, inputs, num_blocks)
    return rows


def _rows(base, forms: list[Forms], inputs: list[Tensor], num_blocks: int) -> list[Row]:
    group = EmulatedProcessGroup(0, TP, LINK, num_blocks=num_blocks)
    programs = with_twin("unsplit", _step(Runnable(base), inputs), group)
    for each in forms:
        name = f"ordered {each.num_replicas}"
        programs[name] = with_twin(name, _step(Runnable(each.overlapped), inputs), group)[name]
    with registered({"tp": group}):
        samples = measure_rounds(programs, ROUNDS)
    rows = []
    where = f"emulated on one GPU, {num_blocks} multiprocessors a message"
    for direction in DIRECTIONS:
        ratios = [
            whole_s / free_s - 1
            for whole_s, free_s in zip(
                samples.of("unsplit", direction),
                samples.of("unsplit" + FREE, direction),
                strict=True,
            )
        ]
        rows.append(_row(f"{where}: {direction} communication / compute", ratios, "lower"))
        for each in forms:
            found = net_hidden(samples, "unsplit", f"ordered {each.num_replicas}", direction)
            rows.append(_row(f"{where}: {direction} net hidden, R = {each.num_replicas}", found))
    return rows


def _step(runnable: Runnable, inputs: list[Tensor]):
    return lambda: timed_step(runnable, inputs)


def _row(claim: str, samples: list[float], better: Literal["higher", "lower"] = "higher") -> Row:
    return Row(claim=claim, unit="", target=None, better=better, samples=samples)


def _captured(quick: bool) -> Graph:
    num_tokens = 2048 if quick else 8192
    config = DecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=8192,
        intermediate_size=28672,
        num_layers=2 if quick else 4,
        num_heads=64,
        num_kv_heads=8,
        head_size=128,
        max_positions=num_tokens,
    )
    # As large as all ranks together, so not made.
    with FakeTensorMode(), torch.device("cuda"), default_dtype(torch.bfloat16):
        model = Decoder(config)
        tokens_BT = torch.empty((1, num_tokens), dtype=torch.int64)
    plan = ParallelPlan(tp=TP, replicas="auto")
    return prepared(capture(model, tokens_BT, plan, loss=_loss))


def _loss(model: Decoder, tokens_BT: Tensor) -> Tensor:
    return model.loss(model(tokens_BT), tokens_BT) / tokens_BT.numel()


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("overlap_emulated runs on a GPU, and there is none: nothing measured.")
    run_benchmark("overlap_emulated", measure)
