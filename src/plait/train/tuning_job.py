"""A job of fine-tuning: from a model folder and conversations to an adapter and a model folder."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from plait.errors import ConfigError
from plait.nn.lora import LoraSettings
from plait.train.job import TORCH_DTYPES, Dtype, Level, settled_dtype
from plait.train.optimizer import OptimizerSettings
from plait.train.rows import OnBadRow


@dataclass(frozen=True, kw_only=True)
class TuningJob:
    """What `plait train sft` and `plait train dpo` run.

    objective: "sft" learns what the assistant says [Ouyang et al. 2022, section 3.5]; "dpo" learns
    to prefer chosen answers to rejected ones, with strength beta [Rafailov et al. 2023,
    arXiv:2305.18290, eq. 7].
    model: a model folder, or a run. data: rows; evaluation_data: more such, each scored by itself.
    template: "" = the model's own chat template, "plain", or a Jinja file.
    method: "lora" trains adapters beside frozen weights of `dtype`, "full" all weights in float32.
    adapter: "" = fresh adapters; an adapter folder of PEFT, or a run, whose adapter learns on.
    pack: put several samples into a row; they do not see each other.
    batch_size: rows of one optimizer step; pairs, for "dpo". num_steps: 0 = num_epochs decide.
    evaluate_every, save_every: in steps. keep_best: keep the checkpoint of the best evaluation.
    on_bad_row: "skip" leaves out rows that cannot be used; they are counted and named in data.json.
    num_workers: processes that encode; 0 = this one.
    tensorboard: write TensorBoard's event files too. level: as in `Job`.
    """

    name: str
    objective: Literal["sft", "dpo"]
    model: str = ""
    data: str = ""
    evaluation_data: tuple[str, ...] = ()
    template: str = ""
    method: Literal["lora", "full"] = "lora"
    adapter: str = ""
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimizer: OptimizerSettings = field(
        default_factory=lambda: OptimizerSettings(
            learning_rate=2e-4, warmup_steps=10, weight_decay=0.0, beta2=0.999
        )
    )
    beta: float = 0.1
    sequence_length: int = 1024
    pack: bool = True
    batch_size: int = 8
    micro_batch_size: int = 8
    num_epochs: int = 1
    num_steps: int = 0
    evaluate_every: int = 100
    save_every: int = 100
    keep_checkpoints: int = 2
    keep_best: bool = True
    on_bad_row: OnBadRow = "error"
    num_workers: int = 0
    seed: int = 0
    tensorboard: bool = False
    dtype: Dtype = "auto"
    level: Level = "eager"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        """Check the ranges; whether the folders exist is asked when the run begins."""
        for name in (
            *("sequence_length", "batch_size", "micro_batch_size", "num_epochs"),
            *("evaluate_every", "save_every", "keep_checkpoints"),
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("num_steps", "num_workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative.")
        if self.beta <= 0:
            raise ConfigError(f"beta={self.beta} must be positive.")
        if self.batch_size % self.micro_batch_size:
            raise ConfigError(
                f"micro_batch_size={self.micro_batch_size} does not divide "
                f"batch_size={self.batch_size}."
            )
        if self.objective == "dpo" and self.pack:
            raise ConfigError("pack=true is for sft: the two answers of a preference stay rows.")
        if self.method == "full" and self.lora.quantize:
            raise ConfigError("lora.quantize needs method=lora: four-bit weights do not learn.")
        if self.adapter and self.method == "full":
            raise ConfigError("adapter needs method=lora. Merge it first: plait merge.")
        if self.adapter and replace(self.lora, quantize=False) != LoraSettings():
            raise ConfigError(
                "adapter brings its own rank, alpha and targets: leave these settings of lora away."
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} must lie in 0..2**63 - 1.")

    def check_ready(self) -> None:
        """Raise ConfigError unless model and data are named."""
        missing = [name for name in ("model", "data") if not getattr(self, name)]
        if missing:
            hints = " ".join(f"--set {name}=..." for name in missing)
            raise ConfigError(f"{self.name} needs {' and '.join(missing)}: give {hints}.")
        if not Path(self.model).is_dir():
            raise ConfigError(f"model={self.model} is not a folder.")
        if self.adapter and not Path(self.adapter).is_dir():
            raise ConfigError(f"adapter={self.adapter} is not a folder.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as PyTorch's object."""
        return TORCH_DTYPES[settled_dtype(self.dtype, self.torch_device().type)]

    def torch_device(self) -> torch.device:
        """Choose the device; raises ConfigError if it is asked for and missing."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device=cuda, but PyTorch finds no GPU. Use device=cpu.")
        is_gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if is_gpu else "cpu")
