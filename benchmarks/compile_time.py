"""Time until the first training step of a deep model is done: compiled anew, and warm.

Each measurement is a process of its own with empty caches; imports are left out and shown apart.
Each figure is the best of the repetitions, as other processes only ever add time. With --level O1
or O2 the rival is TorchInductor, block by block (regional) and whole.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.result import ROOT, Row, finish, make_on_device, run_levels

MODELS = {"decoder": "plait's Llama", "hugging_face": "Hugging Face's Llama"}
SHAPE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NUM_TOKENS = 32
LAYERS = (40, 80, 120)

Child = dict[str, float]


def measure(quick: bool) -> list[Row]:
    """Measure both models, then the capture of a model that no machine here could hold."""
    repeats, layers = (1, (16,)) if quick else (3, LAYERS)
    middle = layers[len(layers) // 2]
    rows = []
    for model, name in MODELS.items():
        best = {
            (side, count): _best(repeats, side=side, model=model, layers=count)
            for side in ("jit", "backend", "aot_eager")
            for count in (layers if side == "jit" else (middle,))
        }
        rows += _ratio_rows(f"{name}, {middle} layers", middle, best)
        rows += _depth_rows(name, {n: best["jit", n]["step_s"] for n in layers})
        rows += _warm_rows(f"{name}, {middle} layers", repeats, model, middle)
    return [*rows, *_import_rows(repeats), *_large_rows(quick)]


def _ratio_rows(name: str, layers: int, best: Mapping[tuple[str, int], Child]) -> list[Row]:
    sides = {"jit": "plait.jit", "backend": 'torch.compile(backend="plait")'}
    rival = best["aot_eager", layers]["step_s"]
    ratios = [
        _row(
            f"{name}: first step, aot_eager / {text}",
            "x",
            target,
            rival / best[side, layers]["step_s"],
        )
        for (side, text), target in zip(sides.items(), (8.0, 3.0), strict=True)
    ]
    seconds = [
        _row(f"{name}: {what} of {side}", "s", None, best[side, layers][key])
        for side in ("jit", "backend", "aot_eager")
        for key, what in (("step_s", "first step"), ("import_s", "imports (left out)"))
    ]
    return ratios + seconds


def _depth_rows(name: str, seconds: Mapping[int, float], target: float = 0.04) -> list[Row]:
    """Row of the slope of a straight line through the depths."""
    claim, unit = f"{name}: each further layer", "s"
    if len(seconds) < 2:
        return [Row(claim=claim, unit=unit, target=target, better="lower", full_only=True)]
    slope = statistics.linear_regression(list(seconds), list(seconds.values())).slope
    depths = [_row(f"{name}: first step of {n} layers", "s", None, s) for n, s in seconds.items()]
    return [_row(claim, unit, target, slope), *depths]


def _warm_rows(name: str, repeats: int, model: str, layers: int, side: str = "jit") -> list[Row]:
    """Row of a first step whose cache another process has filled."""
    with TemporaryDirectory() as folder:
        arguments = {"side": side, "model": model, "layers": layers}
        _child(folder, **arguments)
        warm = [_child(folder, **arguments)["step_s"] for _ in range(repeats)]
    return [_row(f"{name}: first step from a filled cache", "s", 3.0, min(warm))]


def _import_rows(repeats: int) -> list[Row]:
    code = "import time; t = time.perf_counter(); import plait; print(time.perf_counter() - t)"
    seconds = [float(_run([sys.executable, "-c", code], dict(os.environ))) for _ in range(repeats)]
    return [_row("import plait", "s", 2.5, min(seconds))]


def _large_rows(quick: bool) -> list[Row]:
    claims = {
        "capture_s": ("Llama 3 405B: capture of the joint graph, one core", "s", 12.0),
        "peak_gib": ("Llama 3 405B: peak memory of the process", "GiB", 3.0),
    }
    if quick:
        return [
            Row(claim=claim, unit=unit, target=target, better="lower", full_only=True)
            for claim, unit, target in claims.values()
        ]
    best = _best(3, side="capture", model="llama3_405b", layers=126)
    return [_row(claim, unit, target, best[key]) for key, (claim, unit, target) in claims.items()]


def _row(claim: str, unit: str, target: float | None, value: float) -> Row:
    better = "higher" if unit == "x" else "lower"
    return Row(claim=claim, unit=unit, target=target, better=better, samples=[value])


def _best(repeats: int, **arguments: Any) -> Child:
    """Run fresh processes with empty caches; return the least of each figure."""
    runs = []
    for _ in range(repeats):
        with TemporaryDirectory() as folder:
            runs.append(_child(folder, **arguments))
    return {key: min(run[key] for run in runs) for key in runs[0]}


def _child(folder: str, **arguments: Any) -> Child:
    environment = os.environ | {
        "PLAIT_CACHE": str(Path(folder) / "plait"),
        "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # no trial build of vector code, on any side
    }
    module = [sys.executable, "-m", "benchmarks.compile_time", "--child"]
    result = _run([*module, json.dumps(arguments | {"started_s": time.time()})], environment)
    print(f"{arguments}: {result.strip()}", file=sys.stderr)
    return json.loads(result)


def _run(command: list[str], environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def _work(*, side: str, model: str, layers: int, started_s: float) -> Child:
    import torch
    import torch._dynamo
    import torch.fx.experimental.symbolic_shapes

    import plait

    torch.manual_seed(0)
    if side == "capture":
        return _capture_405b(layers)
    make_on_device()
    step, parameters, blocks = _decoder(layers) if model == "decoder" else _hugging_face(layers)
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, NUM_TOKENS))
    import_s = time.time() - started_s
    start_s = time.perf_counter()
    compiled = {
        "jit": lambda: plait.jit(step, level="O0"),
        "backend": lambda: torch.compile(step, backend="plait", options={"level": "O0"}),
        "aot_eager": lambda: torch.compile(step, backend="aot_eager"),
        "O1": lambda: plait.jit(step, level="O1"),
        "O2": lambda: plait.jit(step, level="O2"),
        "regional": lambda: compile_blocks(step, blocks),
        "whole": lambda: torch.compile(step),
    }[side]()
    compiled(tokens).backward()
    finish()
    step_s = time.perf_counter() - start_s
    if any(parameter.grad is None for parameter in parameters):
        raise RuntimeError("the step left a parameter without a gradient")
    return {"step_s": step_s, "import_s": import_s, "peak_gib": _peak_gib()}


def compile_blocks(step: Callable, blocks: list) -> Callable:
    """Compile each block by itself, as PyTorch advises for deep models (regional compilation)."""
    for block in blocks:
        block.compile()
    return step


def _decoder(layers: int) -> tuple[Callable, list, list]:
    from plait.models.decoder import Decoder, DecoderConfig

    config = DecoderConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["intermediate_size"],
        num_layers=layers,
        num_heads=SHAPE["num_attention_heads"],
        num_kv_heads=SHAPE["num_key_value_heads"],
        head_size=SHAPE["hidden_size"] // SHAPE["num_attention_heads"],
        max_positions=SHAPE["max_position_embeddings"],
    )
    model = Decoder(config)
    model.initialize()
    return (
        lambda tokens: model.loss(model(tokens[:, :-1]), tokens[:, 1:]),
        list(model.parameters()),
        list(model.layers),
    )


def _hugging_face(layers: int) -> tuple[Callable, list, list]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).train()
    return (
        lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss,
        list(model.parameters()),
        list(model.model.layers),
    )


def _capture_405b(layers: int) -> Child:
    """Capture training of Llama 3 405B without its weights."""
    import torch

    import plait

    torch.set_num_threads(1)
    model, tokens = llama_405b(layers)
    start_s = time.perf_counter()
    plait.capture(model, tokens, loss=lambda model, tokens: model.loss(model(tokens), tokens))
    return {"capture_s": time.perf_counter() - start_s, "peak_gib": _peak_gib()}


def llama_405b(layers: int) -> tuple[Any, Any]:
    """Llama 3 405B [Grattafiori et al. 2024, table 3] and a row of 8,192 tokens, without memory."""
    import torch

    from plait.models.decoder import Decoder, DecoderConfig
    from plait.nn.rotary import Rope

    config = DecoderConfig(
        vocab_size=128_256,
        hidden_size=16_384,
        intermediate_size=53_248,
        num_layers=layers,
        num_heads=128,
        num_kv_heads=8,
        head_size=128,
        max_positions=8192,
        rope=Rope(theta=500_000.0),
    )
    with torch.device("meta"):
        return Decoder(config), torch.empty(1, 8192, dtype=torch.int64)


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def _of_level(level: str, quick: bool) -> list[Row]:
    """Compare a level that makes kernels with Inductor, block by block and whole."""
    repeats, layers = (1, (8, 16)) if quick else (3, LAYERS)
    middle = layers[len(layers) // 2]
    rows: list[Row] = []
    for model, name in MODELS.items() if level == "O1" else [("decoder", MODELS["decoder"])]:
        depths = layers if level == "O1" else (middle,)
        ours = {n: _best(repeats, side=level, model=model, layers=n)["step_s"] for n in depths}
        rivals = {
            "regional Inductor": _best(repeats, side="regional", model=model, layers=middle),
            "whole-model Inductor": _best(1, side="whole", model=model, layers=middle),
        }
        targets = dict(zip(rivals, (1.0, 10.0) if level == "O1" else (None, None), strict=True))
        claim = f"{name}, {middle} layers: first step"
        for rival, found in rivals.items():
            ratio = found["step_s"] / ours[middle]
            rows.append(_row(f"{claim}, {rival} / {level}", "x", targets[rival], ratio))
            rows.append(_row(f"{claim} of {rival}", "s", None, found["step_s"]))
        rows.append(_row(f"{claim} of {level}", "s", None, ours[middle]))
        if level == "O1":
            rows += _depth_rows(f"{name}, {level}", ours, 0.06)
            rows += _warm_rows(f"{name}, {level}, {middle} layers", repeats, model, middle, level)
    return rows


if __name__ == "__main__":
    if "--child" in sys.argv:
        print(json.dumps(_work(**json.loads(sys.argv[-1]))))
    else:
        levels = {level: partial(_of_level, level) for level in ("O1", "O2")}
        run_levels("compile_time", {"O0": measure, **levels})
