"""The training loop: prepare the data, step, evaluate, save; stop anywhere and go on.

A run is a function of its job: the same job gives the same losses, whether it ran in one piece or
was stopped and resumed (bit for bit with the same number of threads on the same kind of machine).
"""

import math
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from plait.checkpoint.huggingface import end_tokens
from plait.checkpoint.training_state import (
    TrainingState,
    export_model,
    load_training_state,
    save_training_state,
)
from plait.errors import TrainingError
from plait.models.decoder import Decoder
from plait.train.corpus_start import start_from_corpus
from plait.train.data import PackedSamples
from plait.train.environment import describe_environment
from plait.train.evaluate import Evaluation, Scoring, evaluate
from plait.train.job import Job
from plait.train.optimizer import (
    make_optimizers,
    optimizer_leaves,
    restore_optimizers,
    set_learning_rate,
)
from plait.train.packing import Batch, layout_of_stream
from plait.train.prepare import HeldOut, prepare, prepare_more, tokens_of
from plait.train.records import Records
from plait.train.run_folder import RunFolder
from plait.train.step import StepResult, hidden_of, notices, train_step
from plait.train.utilization import utilization_on
from plait.train.watch import Record, Watch


@dataclass(frozen=True)
class TrainResult:
    """Where the run stands when the loop returns; finished unless it was asked to stop.

    elapsed_s is the time of all its steps, those before a resume included.
    """

    model: Decoder
    step: int
    elapsed_s: float
    finished: bool


def train(job: Job, run: RunFolder, watch: Watch) -> TrainResult:
    """Run a job in its folder, from its last checkpoint if any, to the end or a stop.

    Raises DataError for unusable data, CheckpointError if saving or resuming fails, TrainingError
    if the loss or the gradient is not finite.
    """
    with run.lock():
        prepare(job, run, watch)
        return _Loop(job, run, watch).run_to_end()


class _Loop:
    def __init__(self, job: Job, run: RunFolder, watch: Watch) -> None:
        self.job, self.run, self.watch = job, run, watch
        train_tokens, heldout_tokens = tokens_of(run)
        self.samples = PackedSamples(
            train_tokens, sequence_length=job.sequence_length, seed=job.seed
        )
        self.heldout = heldout_tokens
        self.heldout_bytes = run.read_corpus()["num_bytes"]["heldout"]
        self.device = job.torch_device()
        self.model = Decoder(job.model)
        self.model.to(self.device)
        self.optimizers = make_optimizers(self.model, job.optimizer)
        self.hidden = hidden_of(self.model, dtype=job.torch_dtype, level=job.level)
        self.more = prepare_more(job, run, watch)
        (self.end_of_text,) = end_tokens(run.tokenizer)
        self.utilization = utilization_on(
            self.device, self.model, job.model, length=job.sequence_length
        )
        self.best = math.inf
        self.step = 0
        self.elapsed_s = 0.0

    def run_to_end(self) -> TrainResult:
        self._resume()
        self.run.write_environment(describe_environment(self.device))
        for notice in notices(self.device, self.job.torch_dtype, self.job.level):
            self.watch.on_stage(notice)
        self.model.train()
        with Records(
            self.run, self.watch, after=self.step, tensorboard=self.job.tensorboard
        ) as self.records:
            while self.step < self.job.num_steps:
                self._one_step()
                is_last = self.step == self.job.num_steps
                if is_last or self.step % self.job.evaluation.every == 0:
                    self._evaluate()
                stopping = self.watch.should_stop()
                if is_last or stopping or self.step % self.job.save_every == 0:
                    self._save()
                if stopping and not is_last:
                    return TrainResult(self.model, self.step, self.elapsed_s, finished=False)
        self.watch.on_stage("saving the model")
        export_model(self.run.model, self.model, self.run.tokenizer)
        return TrainResult(self.model, self.step, self.elapsed_s, finished=True)

    def _start(self) -> None:
        """Make the weights of step 0."""
        torch.manual_seed(self.job.seed)
        self.model.initialize(torch.Generator(self.device).manual_seed(self.job.seed))
        if self.job.initialization == "corpus":
            self.watch.on_stage("starting from the statistics of the corpus")
            start_from_corpus(self.model, self.samples.tokens, seed=self.job.seed)

    def _one_step(self) -> None:
        started_s = time.perf_counter()
        job = self.job
        rate = job.optimizer.learning_rate_at(self.step, job.num_steps)
        set_learning_rate(self.optimizers, rate)
        result = train_step(
            self.model,
            self.hidden,
            self.optimizers,
            self._micro_batches(),
            num_targets=job.batch_size * job.sequence_length,
            dtype=job.torch_dtype,
            clip_norm=job.optimizer.clip_norm,
        )
        if not result.is_finite:
            self._refuse(result)
        self.step += 1
        duration_s = time.perf_counter() - started_s
        self.elapsed_s += duration_s
        tokens_per_s = job.batch_size * job.sequence_length / duration_s
        record: Record = {
            "step": self.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "tokens_per_s": tokens_per_s,
            "elapsed_s": self.elapsed_s,
        }
        if self.utilization is not None:
            record["mfu"] = self.utilization.of(tokens_per_s)
        self.records.add(record)

    def _micro_batches(self) -> Iterator[Batch]:
        first = self.step * self.job.batch_size
        for start in range(first, first + self.job.batch_size, self.job.micro_batch_size):
            inputs, targets = self.samples.batch(range(start, start + self.job.micro_batch_size))
            layout = None
            if self.job.document_boundaries:
                layout = layout_of_stream(inputs, end_of_text=self.end_of_text)
            yield Batch(inputs, targets, layout).to(self.device)

    def _evaluate(self) -> None:
        own = self._score(HeldOut(self.heldout, self.heldout_bytes))
        loss = own.nats / own.num_tokens
        record: Record = {
            "step": self.step,
            "heldout_loss": loss,
            "heldout_bits_per_byte": own.bits_per_byte,
        }
        for name, data in self.more.items():
            result = self._score(data)
            record[f"heldout_loss/{name}"] = result.nats / result.num_tokens
            record[f"heldout_bits_per_byte/{name}"] = result.bits_per_byte
        self.records.add(record)
        if self.job.keep_best and loss < self.best:
            self.best = loss
            save_training_state(self.run.best, self.model, self._state(), self.run.tokenizer)

    def _score(self, data: HeldOut) -> Evaluation:
        length = self.job.sequence_length
        return evaluate(
            self.model,
            data.tokens,
            num_bytes=data.num_bytes,
            scoring=Scoring(context=length, stride=length, dtype=self.job.dtype),
            most_windows=self.job.evaluation.samples,
            end_of_text=self.end_of_text if self.job.document_boundaries else None,
        )

    def _state(self) -> TrainingState:
        leaves = optimizer_leaves(self.model, self.optimizers)
        leaves["random.torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            leaves["random.cuda"] = torch.cuda.get_rng_state(self.device)
        facts = {
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "num_threads": torch.get_num_threads(),
            "best": None if math.isinf(self.best) else self.best,
        }
        return TrainingState(leaves, facts)

    def _save(self) -> None:
        target = self.run.checkpoints / f"step-{self.step:06d}"
        save_training_state(target, self.model, self._state(), self.run.tokenizer)
        for folder in self.run.step_folders()[: -self.job.keep_checkpoints]:
            shutil.rmtree(folder)

    def _resume(self) -> None:
        """Go to the newest checkpoint, or to the start, and forget the records behind it."""
        folders = self.run.step_folders()
        if not folders:
            self._start()
        else:
            self.watch.on_stage(f"resuming from {folders[-1].name}")
            state = load_training_state(folders[-1], self.model)
            restore_optimizers(self.model, self.optimizers, state.leaves)
            torch.set_rng_state(state.leaves["random.torch"])
            if self.device.type == "cuda" and "random.cuda" in state.leaves:
                torch.cuda.set_rng_state(state.leaves["random.cuda"], self.device)
            self.step, self.elapsed_s = state.facts["step"], state.facts["elapsed_s"]
            best = state.facts.get("best")
            self.best = math.inf if best is None else best
            if (before := state.facts["num_threads"]) != (now := torch.get_num_threads()):
                warnings.warn(
                    f"this run was started with {before} threads and goes on with {now}: "
                    "sums may differ in their last bits.",
                    stacklevel=2,
                )

    def _refuse(self, result: StepResult) -> None:
        """Save the weights before the step and what it was fed, then stop."""
        first = self.step * self.job.batch_size
        target = self.run.path / f"not-finite-step-{self.step + 1:06d}"
        state = self._state()
        inputs, targets = self.samples.batch(range(first, first + self.job.batch_size))
        state.leaves["batch.inputs"], state.leaves["batch.targets"] = inputs, targets
        state.facts["loss"], state.facts["grad_norm"] = str(result.loss), str(result.grad_norm)
        save_training_state(target, self.model, state, self.run.tokenizer)
        what = "loss" if not math.isfinite(result.loss) else "gradient"
        raise TrainingError(
            f"the {what} of step {self.step + 1} is not finite (loss {result.loss}, gradient norm "
            f"{result.grad_norm}). Nothing was updated; weights and batch are in {target}. "
            "Start a new run with a lower --set optimizer.learning_rate."
        )
