"""Training speed and memory of `stdlib_15m` against `transformers.Trainer`.

Same model, weights, samples, batch, dtype, optimizer (fused AdamW) and clipping; each side runs in
its own process, in turn, five times. A run's figure is the median over its steps after the warm-up.
With --level O1 our steps are compiled and fused (`--set level=O1`), which the warm-up pays for.
"""

import json
import resource
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.result import ROOT, Row, run_levels

SIDES = ("plait", "transformers")
WARM_UP_STEPS = 5
TARGETS = {"eager": 1.15, "O1": 1.3}


def measure(level: str, quick: bool) -> list[Row]:
    """Run both sides in turn and compare."""
    rounds, steps = (1, 12) if quick else (5, 16)
    with TemporaryDirectory() as folder:
        _worker("prepare", folder, steps, level)
        # Each round begins with the other side.
        orders = [SIDES if i % 2 == 0 else SIDES[::-1] for i in range(rounds)]
        runs = [{side: _worker(side, folder, steps, level) for side in order} for order in orders]
    for run in runs:
        ours, theirs = (run[side]["loss"] for side in SIDES)
        if abs(ours - theirs) > 0.02 * theirs:
            raise RuntimeError(f"the sides do not learn the same: losses {ours} and {theirs}")

    def of(side: str, quantity: str) -> list[float]:
        return [run[side][quantity] for run in runs]

    def ratio(quantity: str) -> list[float]:
        pairs = zip(of("plait", quantity), of("transformers", quantity), strict=True)
        return [ours / theirs for ours, theirs in pairs]

    return [
        Row(
            claim=f"training speed, {_dtype_name()}, {level}, ratio to transformers.Trainer",
            unit="x",
            target=TARGETS[level],
            better="higher",
            samples=ratio("tokens_per_s"),
        ),
        Row(
            claim="peak memory of the process, ratio to transformers.Trainer",
            unit="x",
            target=1.0,
            better="lower",
            samples=ratio("peak_bytes"),
        ),
        Row(
            claim="memory above what the imports take, ratio to transformers.Trainer",
            unit="x",
            target=1.0,
            better="lower",
            samples=ratio("training_bytes"),
        ),
        *(
            Row(
                claim=f"{name} of {side}",
                unit=unit,
                target=None,
                better=better,
                samples=[sample * scale for sample in of(side, quantity)],
            )
            for name, quantity, unit, better, scale in (
                ("training speed", "tokens_per_s", "tokens/s", "higher", 1),
                ("peak memory", "peak_bytes", "MB", "lower", 1e-6),
                ("memory above what the imports take", "training_bytes", "MB", "lower", 1e-6),
                ("mean loss of the steps", "loss", "nats/token", "lower", 1),
            )
            for side in SIDES
        ),
    ]


def _dtype_name() -> str:
    from plait.recipes.catalog import find_recipe

    return str(find_recipe("stdlib_15m").torch_dtype).removeprefix("torch.")


def _worker(side: str, folder: str, steps: int, level: str) -> dict[str, float]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.train_throughput",
        "--worker",
        side,
        folder,
        str(steps),
        level,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _work(side: str, folder: Path, steps: int, level: str) -> dict[str, float]:
    from dataclasses import replace

    from plait.recipes.catalog import find_recipe

    job = replace(find_recipe("stdlib_15m"), level=level)
    if side == "prepare":
        return _prepare(job, folder)
    run = _run_plait if side == "plait" else _run_transformers
    start, durations_s, loss = run(job, folder, steps)
    tokens = job.batch_size * job.sequence_length
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_s": tokens / median(durations_s[WARM_UP_STEPS:]),
        "peak_bytes": peak,
        "training_bytes": peak - start,
        "loss": loss,
    }


def _prepare(job, folder: Path) -> dict[str, float]:
    """Write the corpus, the tokens and the initial weights that both sides start from."""
    import torch

    from plait.checkpoint.training_state import export_model
    from plait.models.decoder import Decoder
    from plait.train.prepare import prepare
    from plait.train.run_folder import RunFolder
    from plait.train.watch import Watch

    run = RunFolder(folder / "prepared")
    run.path.mkdir()
    prepare(job, run, Watch())
    model = Decoder(job.model)
    model.initialize(torch.Generator().manual_seed(job.seed))
    export_model(folder / "initial", model, run.tokenizer)
    return {}


def _resident_bytes() -> float:
    import psutil

    return psutil.Process().memory_info().rss


def _run_plait(job, folder: Path, steps: int) -> tuple[float, list[float], float]:
    import shutil
    from dataclasses import replace

    from plait.executor.host_memory import keep_freed_memory
    from plait.train.loop import train
    from plait.train.run_folder import RunFolder
    from plait.train.watch import Watch

    start = _resident_bytes()
    keep_freed_memory()  # as `plait train` does
    run = RunFolder(folder / f"plait-{time.time_ns()}")
    optimizer = replace(job.optimizer, kind="adamw", warmup_steps=0, final_fraction=1.0)
    # From noise: `initial` holds the weights of that start, and the rival begins with them.
    job = replace(
        job, initialization="random", num_steps=steps, save_every=10**9, optimizer=optimizer
    )
    job = replace(job, evaluation=replace(job.evaluation, every=10**9, samples=1))
    run.write_job(job)
    shutil.copytree(folder / "prepared", run.path, dirs_exist_ok=True)
    times: list[float] = []
    losses: list[float] = []

    def on_record(record) -> None:
        if "loss" in record:
            times.append(time.perf_counter())
            losses.append(record["loss"])

    train(job, run, Watch(on_record=on_record))
    durations_s = [later - earlier for earlier, later in pairwise(times)]
    return start, durations_s, sum(losses) / len(losses)


def _run_transformers(job, folder: Path, steps: int) -> tuple[float, list[float], float]:
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from plait.train.data import PackedSamples
    from plait.train.prepare import tokens_of
    from plait.train.run_folder import RunFolder

    start = _resident_bytes()
    tokens, _ = tokens_of(RunFolder(folder / "prepared"))
    samples = PackedSamples(tokens, sequence_length=job.sequence_length, seed=job.seed)

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return steps * job.batch_size

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            inputs, targets = samples.batch([index])
            # shift_labels is how the model takes targets that are shifted already.
            return {"input_ids": inputs[0], "labels": targets[0], "shift_labels": targets[0]}

    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            times.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    settings = job.optimizer
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=job.batch_size,
        remove_unused_columns=False,  # it would drop shift_labels
        bf16=job.torch_dtype is torch.bfloat16,
        use_cpu=True,
        optim="adamw_torch_fused",
        learning_rate=settings.learning_rate,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip_norm,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_strategy="steps",
        logging_steps=steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = LlamaForCausalLM.from_pretrained(folder / "initial", dtype=torch.float32)
    trainer = Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[Clock()])
    trainer.train()
    durations_s = [later - earlier for earlier, later in pairwise(times)]
    return start, durations_s, losses[-1]


if __name__ == "__main__":
    if "--worker" in sys.argv:
        _, side, folder, steps, level = sys.argv[1:]
        print(json.dumps(_work(side, Path(folder), int(steps), level)))
    else:
        run_levels("train_throughput", {level: partial(measure, level) for level in TARGETS})
