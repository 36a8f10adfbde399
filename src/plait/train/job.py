"""A job: everything that decides what a run computes, in one frozen record."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from plait.errors import ConfigError
from plait.models.decoder import DecoderConfig
from plait.models.registry import check_family
from plait.ops.numerics import bfloat16_pays
from plait.train.corpus import STDLIB, CorpusSettings
from plait.train.corpus_start import check_room
from plait.train.optimizer import OptimizerSettings
from plait.train.rows import OnBadRow

ProductDtype = Literal["bfloat16", "float32"]
Dtype = Literal["auto", "bfloat16", "float32"]
Level = Literal["eager", "O0", "O1", "O2"]
TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def settled_dtype(dtype: Dtype, device_type: str) -> ProductDtype:
    """What "auto" means there: bfloat16, or float32 on a CPU that has no such products."""
    if dtype == "auto":
        return "bfloat16" if bfloat16_pays(device_type) else "float32"
    return dtype


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """When and how the held-out text is scored.

    every: steps between evaluations during training.
    samples: how many samples those score, spread evenly over the held-out side.
    stride: tokens that the final evaluation advances its window by; each token is scored with at
    least sequence_length - stride tokens before it.
    more: further files or folders to score, each by itself, under its name without the ending.
    """

    every: int = 250
    samples: int = 64
    stride: int = 256
    more: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What `plait train` runs; recipes make it, `--set` changes it, `resolved.json` keeps it.

    data: "stdlib" (the running Python's standard library), a file or a folder.
    initialization: "corpus" starts from the statistics of the corpus (`corpus_start.py`).
    batch_size: samples of one optimizer step.
    micro_batch_size: samples of one forward; changes memory, speed and the order of sums.
    dtype: of the matrix products; weights and optimizer are float32. "auto" takes bfloat16 where
    the device has such products; a run folder keeps what it became.
    level: how a step runs: by PyTorch itself ("eager"), or compiled at its start: kernel by kernel
    with the same bits (O0), with fused operators (O1), whole (O2).
    device: "auto" takes a GPU if there is one.
    prompt: completed at the end of the run.
    document_boundaries: let tokens see those of their own document only.
    text_field: where the text stands in data that come in rows; on_bad_row: what to do with rows
    that have none; num_workers: processes that encode rows, 0 = this one.
    keep_best: keep the checkpoint with the lowest held-out loss as well.
    tensorboard: write TensorBoard's event files too.
    """

    name: str
    model: DecoderConfig
    data: str = STDLIB
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    prompt: str = "class Stack:\n    def __init__(self"
    initialization: Literal["random", "corpus"] = "random"
    sequence_length: int = 512
    batch_size: int = 8
    micro_batch_size: int = 8
    num_steps: int = 1000
    seed: int = 0
    dtype: Dtype = "auto"
    level: Level = "eager"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    save_every: int = 250
    keep_checkpoints: int = 2
    keep_best: bool = False
    document_boundaries: bool = False
    text_field: str = "text"
    on_bad_row: OnBadRow = "error"
    num_workers: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Check what the parts cannot check alone."""
        for name in [
            "sequence_length",
            "batch_size",
            "micro_batch_size",
            "num_steps",
            "save_every",
            "keep_checkpoints",
        ]:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.data.strip():
            raise ConfigError(f"data is empty. Give a file, a folder, or {STDLIB!r}.")
        if self.num_workers < 0:
            raise ConfigError(f"num_workers={self.num_workers} must not be negative.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must lie in 0..2**63 - 1.")
        if self.model.vocab_size <= 256:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size}: "
                "a byte-pair encoding needs more than 256 tokens."
            )
        check_family(self.model)
        if self.batch_size % self.micro_batch_size:
            legal = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise ConfigError(
                f"micro_batch_size={self.micro_batch_size} does not divide "
                f"batch_size={self.batch_size}. "
                f"Choose it from {', '.join(map(str, legal))}."
            )
        if self.sequence_length > self.model.max_positions:
            raise ConfigError(
                f"sequence_length={self.sequence_length} is more than the model's limit: "
                f"model.max_positions={self.model.max_positions}. Lower the one or raise the other."
            )
        if self.initialization == "corpus":
            check_room(self.model)
        if not 1 <= self.evaluation.stride <= self.sequence_length:
            raise ConfigError(
                f"evaluation.stride={self.evaluation.stride} must lie in "
                f"1..sequence_length={self.sequence_length}."
            )
        if self.evaluation.every < 1 or self.evaluation.samples < 1:
            raise ConfigError("evaluation.every and evaluation.samples must be at least 1.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as PyTorch's object."""
        return TORCH_DTYPES[settled_dtype(self.dtype, self.torch_device().type)]

    def torch_device(self) -> torch.device:
        """Choose the device; raises ConfigError if it is asked for and missing."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError(
                "device=cuda, but PyTorch finds no GPU. "
                "`plait doctor` says more; or use device=cpu."
            )
        is_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if is_gpu else "cpu")
