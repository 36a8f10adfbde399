"""The loop of fine-tuning: prepare the rows, step, evaluate, save; stop anywhere and go on.

As in `loop.py` a run is a function of its job: stopped and resumed it ends with the same bits.
"""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plait.checkpoint.huggingface import load_config, load_model
from plait.checkpoint.peft import load_adapter, write_adapter
from plait.checkpoint.training_state import (
    TrainingState,
    export_model,
    load_leaves,
    save_leaves,
)
from plait.errors import ConfigError, TrainingError
from plait.models.decoder_config import DecoderConfig
from plait.nn.lora import LoraSettings, add_lora, merge_lora
from plait.train.data import shuffled
from plait.train.environment import describe_environment
from plait.train.loop import TrainResult
from plait.train.optimizer import (
    make_optimizers,
    optimizer_leaves,
    restore_optimizers,
    set_learning_rate,
)
from plait.train.packing import Batch, PackedRows
from plait.train.records import Records
from plait.train.run_folder import RunFolder, adapter_folder
from plait.train.score import trained_model
from plait.train.step import hidden_of, notices, update
from plait.train.tuning_data import name_of, prepare_tuning, record_base
from plait.train.tuning_job import TuningJob
from plait.train.tuning_loss import answer_logps, batch_loss, preference_loss
from plait.train.utilization import utilization_on
from plait.train.watch import Record, Watch


def tune(job: TuningJob, run: RunFolder, watch: Watch) -> TrainResult:
    """Run a job in its folder, from its last checkpoint if any, to the end or a stop.

    The result's model has its adapters merged if it is finished. Raises ConfigError, DataError for
    what cannot be used, TrainingError if the loss or the gradient is not finite.
    """
    job.check_ready()
    with run.lock():
        folder = trained_model(Path(job.model))
        job.torch_device()
        _check_length(job, load_config(folder))
        record_base(job, folder, run)
        prepare_tuning(job, folder, run, watch)
        return _Tuning(job, folder, run, watch).run_to_end()


class _Tuning:
    def __init__(self, job: TuningJob, folder: Path, run: RunFolder, watch: Watch) -> None:
        self.job, self.run, self.watch = job, run, watch
        self.base = folder
        self.device = job.torch_device()
        dtype = job.torch_dtype if job.method == "lora" else torch.float32
        self.model = load_model(folder, dtype=dtype).to(self.device)
        if job.method == "lora":
            self.lora = self._add_adapters()
        self.eager = hidden_of(self.model, dtype=job.torch_dtype, level="eager")
        self.hidden = hidden_of(self.model, dtype=job.torch_dtype, level=job.level)
        self.rows = PackedRows(run.rows("train"), sequence_length=job.sequence_length)
        self.num_samples = len(self.rows) // (2 if job.objective == "dpo" else 1)
        by_epochs = math.ceil(self.num_samples * job.num_epochs / job.batch_size)
        self.num_steps = job.num_steps or by_epochs
        self.optimizers = make_optimizers(self.model, job.optimizer)
        self.utilization = None
        if job.method == "full":  # frozen weights need less, how much depends on where they are
            self.utilization = utilization_on(
                self.device, self.model, self.model.config, length=job.sequence_length
            )
        self.references: dict[str, np.ndarray] = {}
        self.best = math.inf
        self.step = 0
        self.elapsed_s = 0.0

    def _add_adapters(self) -> LoraSettings:
        job = self.job
        if job.adapter:
            folder = adapter_folder(Path(job.adapter))
            return load_adapter(self.model, folder, quantize=job.lora.quantize)
        add_lora(self.model, job.lora, torch.Generator(self.device).manual_seed(job.seed))
        return job.lora

    def run_to_end(self) -> TrainResult:
        if self.job.objective == "dpo":
            for name in ("train", *map(name_of, self.job.evaluation_data)):
                self.references[name] = self._reference(name)
        begins = self._resume()
        self.run.write_environment(describe_environment(self.device))
        for notice in notices(self.device, self.job.torch_dtype, self.job.level):
            self.watch.on_stage(notice)
        after = -1 if begins else self.step
        with Records(
            self.run, self.watch, after=after, tensorboard=self.job.tensorboard
        ) as self.records:
            if begins:
                self._evaluate()
            while self.step < self.num_steps:
                self._one_step()
                is_last = self.step == self.num_steps
                if is_last or self.step % self.job.evaluate_every == 0:
                    self._evaluate()
                stopping = self.watch.should_stop()
                if is_last or stopping or self.step % self.job.save_every == 0:
                    self._save()
                if stopping and not is_last:
                    return TrainResult(self.model, self.step, self.elapsed_s, finished=False)
        self._export()
        return TrainResult(self.model, self.step, self.elapsed_s, finished=True)

    def _one_step(self) -> None:
        started_s = time.perf_counter()
        job = self.job
        rate = job.optimizer.learning_rate_at(self.step, self.num_steps)
        set_learning_rate(self.optimizers, rate)
        self.model.train()
        first = self.step * job.batch_size
        samples = [self._sample(g) for g in range(first, first + job.batch_size)]
        parts = [
            samples[start : start + job.micro_batch_size]
            for start in range(0, len(samples), job.micro_batch_size)
        ]
        batches = [self._batch(self.rows, part) for part in parts]
        num_targets = sum(batch.num_targets for batch in batches)
        share = num_targets if job.objective == "sft" else job.batch_size
        losses = (
            self._loss("train", batch, part)[0] / share
            for batch, part in zip(batches, parts, strict=True)
        )
        result = update(
            self.model.parameters(), self.optimizers, losses, clip_norm=job.optimizer.clip_norm
        )
        if not result.is_finite:
            raise TrainingError(
                f"the loss of step {self.step + 1} is {result.loss}, its gradient norm "
                f"{result.grad_norm}. Nothing was updated. Start a new run with a lower "
                "--set optimizer.learning_rate."
            )
        self.step += 1
        duration_s = time.perf_counter() - started_s
        self.elapsed_s += duration_s
        tokens_per_s = sum(b.inputs.numel() for b in batches) / duration_s
        record: Record = {
            "step": self.step,
            "num_steps": self.num_steps,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "num_targets": num_targets,
            "tokens_per_s": tokens_per_s,
            "elapsed_s": self.elapsed_s,
        }
        if self.utilization is not None:
            record["mfu"] = self.utilization.of(tokens_per_s)
        self.records.add(record)

    def _sample(self, index: int) -> int:
        epoch, place = divmod(index, self.num_samples)
        return shuffled(place, self.num_samples, seed=self.job.seed, epoch=epoch)

    def _batch(self, rows: PackedRows, samples: Sequence[int]) -> Batch:
        if self.job.objective == "dpo":
            return rows.batch([2 * s + side for s in samples for side in (0, 1)]).to(self.device)
        return rows.batch(samples).to(self.device)

    def _loss(self, name: str, batch: Batch, samples: Sequence[int]) -> tuple[Tensor, float]:
        """Sum the loss over targets or pairs, and count the pairs that are won."""
        dtype = self.job.torch_dtype
        hidden = self.hidden if torch.is_grad_enabled() else self.eager
        if self.job.objective == "sft":
            return batch_loss(self.model, hidden, batch, dtype=dtype), 0.0
        reference = self.references[name].reshape(-1, 2)[list(samples)].ravel()
        logps_B = answer_logps(self.model, hidden, batch, dtype=dtype)
        reference_B = torch.from_numpy(reference).to(logps_B)
        return preference_loss(logps_B, reference_B, beta=self.job.beta)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Score every evaluation set; the first one decides which checkpoint is the best."""
        self.model.eval()
        record: Record = {"step": self.step}
        for data in self.job.evaluation_data:
            name = name_of(data)
            rows = PackedRows(self.run.rows(name), sequence_length=self.job.sequence_length)
            loss = won = count = 0.0
            for samples in self._parts(rows):
                batch = self._batch(rows, samples)
                part, part_won = self._loss(name, batch, samples)
                loss, won = loss + part.item(), won + part_won
                count += batch.num_targets if self.job.objective == "sft" else len(samples)
            record[f"heldout_loss/{name}"] = loss / count
            if self.job.objective == "dpo":
                record[f"heldout_won/{name}"] = won / count
        if len(record) > 1:
            first = record[f"heldout_loss/{name_of(self.job.evaluation_data[0])}"]
            self.records.add({"heldout_loss": first, **record})
            if self.job.keep_best and first < self.best:
                self.best = first
                self._save_to(self.run.best)

    def _parts(self, rows: PackedRows) -> Iterator[list[int]]:
        num = len(rows) // (2 if self.job.objective == "dpo" else 1)
        for start in range(0, num, self.job.micro_batch_size):
            yield list(range(start, min(start + self.job.micro_batch_size, num)))

    @torch.no_grad()
    def _reference(self, name: str) -> np.ndarray:
        """Log-probabilities of all answers before anything was learnt, computed once."""
        path = self.run.rows(name).with_suffix(".reference.npy")
        if not path.exists():
            self.watch.on_stage(f"scoring {name} with the model as it is")
            self.model.eval()
            rows = PackedRows(self.run.rows(name), sequence_length=self.job.sequence_length)
            parts = [
                answer_logps(
                    self.model, self.eager, self._batch(rows, part), dtype=self.job.torch_dtype
                ).cpu()
                for part in self._parts(rows)
            ]
            temporary = path.with_suffix(".incomplete.npy")
            np.save(temporary, torch.cat(parts).numpy(), allow_pickle=False)
            temporary.rename(path)
        return np.load(path, allow_pickle=False)

    def _save(self) -> None:
        self._save_to(self.run.checkpoints / f"step-{self.step:06d}")
        for folder in self.run.step_folders()[: -self.job.keep_checkpoints]:
            shutil.rmtree(folder)

    def _save_to(self, target: Path) -> None:
        """Keep what learns, and what is needed to go on."""
        leaves = optimizer_leaves(self.model, self.optimizers)
        leaves |= {name: p.detach() for name, p in self._learning()}
        leaves["random.torch"] = torch.get_rng_state()
        best = None if math.isinf(self.best) else self.best
        facts = {"step": self.step, "elapsed_s": self.elapsed_s, "best": best}
        save_leaves(target, TrainingState(leaves, facts))

    def _resume(self) -> bool:
        """Go to the newest checkpoint; says whether there is none, so that the run begins."""
        folders = self.run.step_folders()
        if not folders:
            torch.manual_seed(self.job.seed)
        else:
            self.watch.on_stage(f"resuming from {folders[-1].name}")
            state = self._load(folders[-1])
            restore_optimizers(self.model, self.optimizers, state.leaves)
            torch.set_rng_state(state.leaves["random.torch"])
            self.step, self.elapsed_s = state.facts["step"], state.facts["elapsed_s"]
            self.best = math.inf if state.facts["best"] is None else state.facts["best"]
        return not folders

    def _load(self, folder: Path) -> TrainingState:
        state = load_leaves(folder)
        with torch.no_grad():
            for name, parameter in self._learning():
                parameter.copy_(state.leaves[name])
        return state

    def _learning(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def _export(self) -> None:
        """Write the best or the last weights: the adapter by itself, and merged into a model."""
        if self.job.keep_best and self.run.best.is_dir():
            step = self._load(self.run.best).facts["step"]
            self.watch.on_stage(f"taking the weights of step {step}, the best on the first set")
        self.watch.on_stage("saving the model")
        self.model.eval()
        if self.job.method == "lora":
            write_adapter(
                self.model, self.run.adapter, settings=self.lora, base_model=str(self.base)
            )
            merge_lora(self.model)
        export_model(self.run.model, self.model, self.run.tokenizer)


def _check_length(job: TuningJob, config: DecoderConfig) -> None:
    if job.sequence_length > (limit := config.max_positions):
        raise ConfigError(
            f"sequence_length={job.sequence_length} is more than the {limit} positions of "
            f"{job.model}. Set a smaller one."
        )
