"""What replicas cost beside the same plan without them: seconds to compile, and memory of a step.

Each time is a process of its own, and the best of several that take turns, as other processes only
ever add time. Memory above the weights is what PyTorch's allocator counts in a step of rank 0 with
free communication, and what the dry run says of the same schedule, and of those that are timed.
"""

import json
import subprocess
import sys
import time
from typing import Any

from benchmarks.compile_time import llama_405b
from benchmarks.result import ROOT, Row, run_benchmark
from benchmarks.step_time import peak_bytes

TP = 8
LAYERS, QUICK_LAYERS = 80, 16
REPEATS, LARGE_REPEATS = 5, 3


def measure(quick: bool) -> list[Row]:
    """Measure a deep small model with and without replicas, a large one, and memory."""
    layers, repeats = (QUICK_LAYERS, 1) if quick else (LAYERS, REPEATS)
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for n, seconds in times.items():
            seconds.append(_child(model="small", layers=layers, replicas=n))
    name = f"Llama, {layers} layers, tp={TP}, sp"
    added = [with_two - alone for alone, with_two in zip(times[1], times[2], strict=True)]
    rows = [
        _row(f"{name}: R=2 adds to capture and compile", "s", 1.5, [min(times[2]) - min(times[1])]),
        _row(f"{name}: R=2 adds, each pair", "s", None, added),
        *(_row(f"{name}: capture and compile, R={n}", "s", None, s) for n, s in times.items()),
    ]
    claim = f"Llama 3 405B, tp={TP}, sp, R=4: captured and ordered"
    if quick:
        rows.append(Row(claim=claim, unit="s", target=20.0, better="lower", full_only=True))
    else:
        large = [_child(model="405b", layers=126, replicas=4) for _ in range(LARGE_REPEATS)]
        rows.append(_row(claim, "s", 20.0, [min(large)]))
    return [*rows, *_memory_rows(), *([] if quick else _priced_rows())]


def _priced_rows() -> list[Row]:
    """Memory of the models whose compilation is timed."""
    rows: list[Row] = []
    for model, layers, replicas in (("small", LAYERS, 2), ("405b", 126, 4)):
        whole, split = (
            _child(model=model, layers=layers, replicas=n, is_priced=True) for n in (1, replicas)
        )
        claim = f"{model}, {layers} layers: priced peak memory, R={replicas} / unsplit"
        rows.append(_row(claim, "x", 1.03, [split / whole]))
    return rows


def _memory_rows() -> list[Row]:
    rows: list[Row] = []
    for model, name in (("memory", "peak memory"), ("price", "priced peak memory")):
        peaks = {n: _child(model=model, layers=4, replicas=n) for n in (1, 2, 4)}
        for n in (2, 4):
            claim = f"step of width 1,024: {name}, R={n} / unsplit"
            rows.append(_row(claim, "x", 1.03, [peaks[n] / peaks[1]]))
        rows.append(_row(f"step of width 1,024: {name}, unsplit", "MB", None, [peaks[1] * 1e-6]))
    return rows


def _row(claim: str, unit: str, target: float | None, samples: list[float]) -> Row:
    return Row(claim=claim, unit=unit, target=target, better="lower", samples=samples)


def _child(**arguments: object) -> float:
    command = [sys.executable, "-m", "benchmarks.replica_cost", "--child", json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stderr}")
    print(f"{arguments}: {done.stdout.strip()}", file=sys.stderr)
    return float(done.stdout.splitlines()[-1])


def _work(*, model: str, layers: int, replicas: int, is_priced: bool = False) -> float:
    """Seconds to capture and compile, or bytes of a step."""
    import torch

    import plait
    from plait.models.decoder import Decoder, DecoderConfig

    torch.set_num_threads(1)
    if model in ("memory", "price"):
        return _peak(replicas, is_priced=model == "price")
    if model == "405b":
        decoder, tokens = llama_405b(layers)
    else:
        config = DecoderConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_layers=layers,
            num_heads=8,
            num_kv_heads=8,
            head_size=8,
            max_positions=512,
        )
        decoder, tokens = Decoder(config), torch.zeros(1, 512, dtype=torch.int64)
    plan = plait.ParallelPlan(tp=TP, sp=True, replicas=replicas)
    start_s = time.perf_counter()
    graph = plait.capture(decoder, tokens, plan, loss=_loss)
    schedule = plait.compile(graph, plan)
    if is_priced:
        return _priced_peak(schedule, plait.clusters.h100(TP))
    return time.perf_counter() - start_s


def _loss(model: Any, tokens: Any) -> Any:
    return model.loss(model(tokens), tokens)


def _peak(replicas: int, *, is_priced: bool) -> float:
    """Bytes above the weights at the peak of a step."""
    import torch

    import plait
    from plait.cost import clusters
    from plait.cost.clusters import Link
    from plait.executor.delayed_process_group import delayed_groups
    from plait.executor.overlap_forms import forms_of, prepared
    from plait.executor.run import Runnable
    from plait.executor.timed_rounds import example_inputs, timed_step
    from plait.models.decoder import Decoder, DecoderConfig

    config = DecoderConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=2816,
        num_layers=4,
        num_heads=16,
        num_kv_heads=16,
        max_positions=1024,
    )
    with torch.device("meta"):
        model, tokens = Decoder(config), torch.zeros(1, 1024, dtype=torch.int64)
    plan = plait.ParallelPlan(tp=4, replicas=max(replicas, 2))
    graph = prepared(plait.capture(model, tokens, plan, loss=_loss))
    forms = forms_of(graph, replicas, clusters.cpu(4))
    if is_priced:
        return _priced_peak(forms.overlapped, clusters.cpu(4))
    runnable = Runnable(forms.overlapped)
    inputs = example_inputs(forms.overlapped, vocab_size=512)
    with delayed_groups({"tp": 4}, Link(latency_s=0.0, bandwidth_bytes_per_s=1e12), scale=0.0):
        timed_step(runnable, inputs)
        return peak_bytes(lambda: timed_step(runnable, inputs))


def _priced_peak(schedule: Any, cluster: Any) -> float:
    """Bytes above the weights at the peak of a step, by the dry run."""
    import plait
    from plait.dryrun.memory_trace import Kind

    ledger = plait.price(schedule, cluster, fragments=False).memory
    return ledger.peak_bytes - ledger.by_kind[Kind.PARAMETERS]


if __name__ == "__main__":
    if "--child" in sys.argv:
        print(_work(**json.loads(sys.argv[-1])))
    else:
        run_benchmark("replica_cost", measure)
