"""LoRA fine-tuning against PEFT and `transformers.Trainer`: speed, loss curve, adapters.

Same base weights (bfloat16 where the machine has such products, else float32; frozen), adapters
(float32), rows, batches, optimizer (fused AdamW), rate and clipping; each side runs in its own
process, in turn. A run's figure is the median over its steps after the warm-up, which with --level
O1 holds the compilation of ours. Every row is one conversation of equal length, so neither side
pads; a quarter of it is the question.
"""

import json
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.result import ROOT, Row, run_levels

SIDES = ("plait", "peft")
WARM_UP_STEPS = 3
LENGTH, BATCH, RANK, ALPHA, RATE = 512, 2, 16, 32.0, 1e-3
MODEL = {
    "vocab_size": 16_384,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_size": 64,
    "max_positions": 1024,
}


def measure(level: str, quick: bool) -> list[Row]:
    """Run both sides in turn and compare."""
    rounds, steps = (1, 6) if quick else (5, 10)
    with TemporaryDirectory() as folder:
        _worker("prepare", folder, steps, level)
        orders = [SIDES if i % 2 == 0 else SIDES[::-1] for i in range(rounds)]
        runs = [{side: _worker(side, folder, steps, level) for side in order} for order in orders]
        exchange = _worker("exchange", folder, steps, level)
    ratios = [run["plait"]["tokens_per_s"] / run["peft"]["tokens_per_s"] for run in runs]
    noise, gap = _loss_gap(runs[0]["plait"]["losses"], runs[0]["peft"]["losses"])
    return [
        Row(
            claim=f"LoRA fine-tuning speed, {_dtype_name()}, {level}, ratio to PEFT",
            unit="x",
            target=1.2,
            better="higher",
            samples=ratios,
        ),
        Row(
            claim="LoRA: mean absolute difference of the losses, in deviations between steps",
            unit="",
            target=1.0,
            better="lower",
            samples=[gap / noise],
        ),
        Row(
            claim="LoRA: largest difference of a float32 logit, our adapter in PEFT",
            unit="",
            target=1e-4,
            better="lower",
            samples=[exchange["out"]],
        ),
        Row(
            claim="LoRA: largest difference of a float32 logit, PEFT's adapter here",
            unit="",
            target=1e-4,
            better="lower",
            samples=[exchange["in"]],
        ),
        *(
            Row(
                claim=f"fine-tuning speed of {side}",
                unit="tokens/s",
                target=None,
                better="higher",
                samples=[run[side]["tokens_per_s"] for run in runs],
            )
            for side in SIDES
        ),
    ]


def _dtype_name() -> str:
    import torch

    from plait.train.job import settled_dtype

    return settled_dtype("auto", "cuda" if torch.cuda.is_available() else "cpu")


def _loss_gap(ours: list[float], theirs: list[float]) -> tuple[float, float]:
    """Spread of the loss from step to step, and how far the curves are apart on average."""
    steps = [b - a for a, b in pairwise(theirs)]
    return stdev(steps), mean(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def _worker(side: str, folder: str, steps: int, level: str) -> dict:
    arguments = [side, folder, str(steps), level]
    command = [sys.executable, "-m", "benchmarks.finetune", "--worker", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def _work(side: str, folder: Path, steps: int, level: Any) -> dict:
    if side == "plait":
        return _run_plait(folder, steps, level)
    return {"prepare": _prepare, "peft": _run_peft, "exchange": _exchange}[side](folder, steps)


def _prepare(folder: Path, steps: int) -> dict:
    """Write a base model, and rows of random tokens with a structure that can be learnt."""
    import numpy as np
    import torch

    from plait.checkpoint.huggingface import write_model
    from plait.models.decoder import Decoder, DecoderConfig
    from plait.train.encode_rows import Sample
    from plait.train.packing import write_packed

    model = Decoder(DecoderConfig(**MODEL, init_std=0.05))
    model.initialize(torch.Generator().manual_seed(0))
    (folder / "base").mkdir()
    write_model(model.to(getattr(torch, _dtype_name())), folder / "base")
    generator = np.random.default_rng(0)
    samples = []
    for number in range(steps * BATCH):
        word = generator.integers(0, 200, 16)
        tokens = np.tile(word, LENGTH // 16 + 1)[: LENGTH + 1].astype(np.uint32)
        samples.append(Sample(str(number), tokens, np.arange(LENGTH + 1) >= LENGTH // 4))
    write_packed(samples, folder / "rows", sequence_length=LENGTH, pack=False)
    return {}


def _figures(times: list[float], losses: list[float]) -> dict:
    durations_s = [later - earlier for earlier, later in pairwise(times)]
    return {
        "tokens_per_s": BATCH * LENGTH / median(durations_s[WARM_UP_STEPS:]),
        "losses": losses,
    }


def _run_plait(folder: Path, steps: int, level: Any) -> dict:
    import torch

    from plait.checkpoint.huggingface import load_model
    from plait.checkpoint.peft import write_adapter
    from plait.nn.lora import LoraSettings, add_lora
    from plait.train.optimizer import OptimizerSettings, make_optimizers
    from plait.train.packing import PackedRows
    from plait.train.step import hidden_of, update
    from plait.train.tuning_loss import batch_loss

    dtype = getattr(torch, _dtype_name())
    model = load_model(folder / "base")
    settings = LoraSettings(rank=RANK, alpha=ALPHA)
    add_lora(model, settings, torch.Generator().manual_seed(0))
    write_adapter(model, folder / "start", settings=settings)
    optimizers = make_optimizers(
        model, OptimizerSettings(learning_rate=RATE, weight_decay=0.0, beta2=0.999)
    )
    hidden = hidden_of(model, dtype=dtype, level=level)
    rows = PackedRows(folder / "rows", sequence_length=LENGTH)
    times, losses = [], []
    for step in range(steps):
        batch = rows.batch(range(step * BATCH, (step + 1) * BATCH))
        loss = batch_loss(model, hidden, batch, dtype=dtype) / batch.num_targets
        result = update(model.parameters(), optimizers, [loss], clip_norm=1.0)
        times.append(time.perf_counter())
        losses.append(result.loss)
    write_adapter(model, folder / "ours", settings=settings, base_model=str(folder / "base"))
    return _figures(times, losses)


def _run_peft(folder: Path, steps: int) -> dict:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from plait.train.packing import PackedRows

    rows = PackedRows(folder / "rows", sequence_length=LENGTH)
    if not (folder / "start").is_dir():
        _run_plait(
            folder, WARM_UP_STEPS + 2, "eager"
        )  # both sides begin with the adapters it draws

    class Samples(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return steps * BATCH

        def __getitem__(self, index: int) -> dict:
            batch = rows.batch([index])
            targets = batch.targets[0]
            return {"input_ids": batch.inputs[0], "labels": targets, "shift_labels": targets}

    times, losses = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            times.append(time.perf_counter())

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if logs and "loss" in logs:
                losses.append(logs["loss"])

    dtype = getattr(torch, _dtype_name())
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model = PeftModel.from_pretrained(base, folder / "start", is_trainable=True)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        remove_unused_columns=False,  # it would drop shift_labels
        bf16=dtype == torch.bfloat16,
        use_cpu=True,
        optim="adamw_torch_fused",
        learning_rate=RATE,
        adam_beta1=0.9,
        adam_beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Samples(), callbacks=[Clock()])
    trainer.train()
    model.save_pretrained(folder / "theirs")
    return _figures(times, losses)


def _exchange(folder: Path, steps: int) -> dict:
    """Compute logits in float32 with both adapters on both sides."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from plait.checkpoint.huggingface import load_model
    from plait.checkpoint.peft import load_adapter

    tokens = torch.randint(0, 200, (2, 128), generator=torch.Generator().manual_seed(0))
    differences = {}
    for way, adapter in (("out", "ours"), ("in", "theirs")):
        ours = load_model(folder / "base", dtype=torch.float32)
        with torch.no_grad():
            bare = ours.logits(ours(tokens))
        load_adapter(ours, folder / adapter)
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, folder / adapter).eval()
        with torch.no_grad():
            logits = ours.logits(ours(tokens))
            gap = logits - theirs(tokens).logits
        if (effect := (logits - bare).abs().max().item()) < 0.1:
            raise RuntimeError(f"the adapter changes no logit by more than {effect}")
        differences[way] = gap.abs().max().item()
    return differences


if __name__ == "__main__":
    if "--worker" in sys.argv:
        _, side, folder, steps, level = sys.argv[1:]
        print(json.dumps(_work(side, Path(folder), int(steps), level)))
    else:
        run_levels("finetune", {level: partial(measure, level) for level in ("eager", "O1")})
