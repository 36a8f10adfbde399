"""A training job of a large model, as plain settings, for `price --world` and `search`."""

from dataclasses import dataclass, field

from plait.dryrun.work import Attention, Kernels
from plait.errors import ConfigError
from plait.models.decoder_config import DecoderConfig
from plait.plan.parallel_plan import ParallelPlan


@dataclass(frozen=True, kw_only=True)
class PretrainJob:
    """One training step of a decoder over a whole cluster.

    model: None where the price is asked of another model (`price_job(..., source=...)`).
    batch_size: sequences in a step, over all ranks; micro_batch_size: of one model copy at a time.
    share_head: the vocabulary is parted over tp, as in Megatron-LM; else each rank computes all of
    it, as `plait.compile` does today. kernels: "fused" pointwise operators, or "eager" ones.
    overlap: tensor-parallel messages run beside weight gradients, and those of fsdp and dp beside
    neighbouring layers. attention: one kernel ("fused"), or products, a softmax and a dropout over
    the whole square of scores, kept for the backward ("unfused") or computed again in it
    ("recomputed"). fused_optimizer: Adam is one kernel, else one for each line of its formula, as
    PyTorch's foreach form is. reruns_all: recompute "full" runs a layer's whole forward again, with
    its messages, as torch.utils.checkpoint did before it stopped early, and not only what the
    backward needs. offload: share of the saved activations that waits in the host's
    memory. expert_load: rows of the busiest rank's experts over the mean; 1 is balanced routing.
    expert_percentile: in place of it, that percentile of the busiest rank's load if all experts are
    chosen alike (`routing.py`). Memory is that of balanced routing.

    Bytes of a parameter: in the gradient that is summed, and in the optimizer (master copy and two
    moments of Adam in float32). Weights and activations are bfloat16.
    """

    name: str
    model: DecoderConfig | None = None
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    sequence_length: int = 4096
    batch_size: int = 1024
    micro_batch_size: int = 1
    share_head: bool = True
    kernels: Kernels = "fused"
    attention: Attention = "fused"
    fused_optimizer: bool = True
    reruns_all: bool = False
    overlap: bool = True
    offload: float = 0.0
    expert_load: float = 1.0
    expert_percentile: float | None = None
    gradient_bytes: int = 4
    optimizer_bytes: int = 12

    def __post_init__(self) -> None:
        """Check what does not depend on the plan."""
        for name in ("sequence_length", "batch_size", "micro_batch_size", "gradient_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.offload <= 1:
            raise ConfigError(f"offload is a share from 0 to 1, got {self.offload}.")
        if self.expert_load < 1:
            raise ConfigError(f"expert_load is the most over the mean, from 1: {self.expert_load}.")
        if self.expert_percentile is not None:
            if not 0 < self.expert_percentile < 100:
                raise ConfigError(
                    f"expert_percentile lies between 0 and 100, got {self.expert_percentile}."
                )
            if self.expert_load != 1:
                raise ConfigError("expert_percentile says what expert_load is: set one of them.")
        if self.optimizer_bytes < 0:
            raise ConfigError(f"optimizer_bytes cannot be negative, got {self.optimizer_bytes}.")
