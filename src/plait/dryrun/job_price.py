"""What a large job costs: times, rates, memory by class of ranks, and how it all reads."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from plait.cost.timeline import Timeline
from plait.dryrun.job_fragments import Fragments
from plait.dryrun.job_memory import Ledger
from plait.dryrun.owners import Owner
from plait.dryrun.pipeline import PipelineRun
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.stages import Stage

_GIB = 2**30
_COMPUTE_FASTER, _COMPUTE_SLOWER = 0.10, 0.35
_COMMUNICATION_ERROR, _BUBBLE_ERROR = 0.30, 0.15
"""Relative half-widths, 10th to 90th percentile. Those of a roofline are fitted to the published
runs of benchmarks/dryrun_scale.py, which are slower more often than faster, for reasons that no
graph shows (power limits, software of its day); the others are assumed."""


@dataclass(frozen=True, kw_only=True)
class TimeParts:
    """What the step of the busiest pipeline rank is made of, in seconds.

    memory_s: operators bound by memory. exposed_s: messages of tp, cp, ep and vocabulary with
    nothing computed beside. interference_s: what messages beside computation slow it down.
    data_parallel_s: fsdp and dp, exposed. bubble_s: waiting for other stages. communication_s is
    no part: all messages of the pieces, hidden ones too.
    """

    matrix_s: float
    attention_s: float
    memory_s: float
    exposed_s: float
    interference_s: float
    data_parallel_s: float
    optimizer_s: float
    bubble_s: float
    communication_s: float

    def shares(self) -> list[tuple[str, float]]:
        """The parts that add up, by name."""
        return [
            ("matrix products", self.matrix_s),
            ("attention", self.attention_s),
            ("memory-bound operators", self.memory_s),
            ("exposed messages (tp, cp, ep)", self.exposed_s),
            ("interference", self.interference_s),
            ("exposed fsdp and dp", self.data_parallel_s),
            ("optimizer", self.optimizer_s),
            ("pipeline bubble", self.bubble_s),
        ]


def interval_s(
    step_s: float, parts: TimeParts, *, interpolated_s: float = 0.0, spread: float = 0.0
) -> tuple[float, float]:
    """The 10th and 90th percentile of a step, from the errors of its parts (independent).

    interpolated_s: of the computation, what rests on measurements; spread: how far these are off
    (logarithm).
    """
    compute_s = parts.matrix_s + parts.attention_s + parts.memory_s + parts.optimizer_s
    compute_s -= interpolated_s
    sent_s = parts.exposed_s + parts.data_parallel_s + parts.interference_s
    others = (_COMMUNICATION_ERROR * sent_s, _BUBBLE_ERROR * parts.bubble_s)
    faster_s = math.hypot(
        _COMPUTE_FASTER * compute_s, -math.expm1(-spread) * interpolated_s, *others
    )
    slower_s = math.hypot(_COMPUTE_SLOWER * compute_s, math.expm1(spread) * interpolated_s, *others)
    return max(0.0, step_s - faster_s), step_s + slower_s


@dataclass(frozen=True, kw_only=True)
class RankClass:
    """Ranks that hold the same stages and as many micro-batches.

    fragments: what PyTorch's caching allocator reserves, of a price that is exact.
    """

    pipeline_ranks: tuple[int, ...]
    stages: tuple[Stage, ...]
    ranks_each: int
    in_flight: int
    ledger: Ledger
    fragments: Fragments | None = None

    @property
    def num_ranks(self) -> int:
        """How many ranks are of this class."""
        return len(self.pipeline_ranks) * self.ranks_each

    @property
    def reserved_bytes(self) -> int | None:
        """What the device must have with fragments, and what lies beside the allocator.

        None where that is not known, or where the allocator ran out of memory first.
        """
        if self.fragments is None or not self.fragments.fixed.fits:
            return None
        return self.fragments.fixed.peak_bytes + self.ledger.outside_bytes

    @property
    def asked_bytes(self) -> int:
        """What the device must have for the allocator's first request that it cannot serve."""
        if self.fragments is None or self.fragments.fixed.fits:
            return self.ledger.total_bytes
        return self.fragments.fixed.needed_bytes + self.ledger.outside_bytes

    def fragmented(self) -> str:
        """What the allocator lacks, though its ledger fits, and whether growing segments help."""
        assert self.fragments is not None
        needed = self.asked_bytes
        advice = (
            "segments that grow (PYTORCH_ALLOC_CONF=expandable_segments:True) fit"
            if self.fragments.expandable.fits
            else "segments that grow do not fit either"
        )
        return (
            f"{self.ledger.total_bytes / _GIB:.1f} GiB are needed on {self.num_ranks} ranks and "
            f"would fit, but the allocator's fragments make it {needed / _GIB:.1f} GiB; {advice}"
        )


def missing(fullest: RankClass, limit_bytes: int) -> str:
    """What the ranks of a class lack of a limit, and where their memory goes."""
    ledger = fullest.ledger
    lack = (ledger.total_bytes - limit_bytes) / _GIB
    kinds = sorted(ledger.bytes_by_kind.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{kind} {size / _GIB:.1f}" for kind, size in kinds if size)
    return (
        f"{lack:.1f} GiB are missing on {fullest.num_ranks} ranks: "
        f"{ledger.total_bytes / _GIB:.1f} GiB are needed ({parts})"
    )


@dataclass(frozen=True, kw_only=True)
class JobPrice:
    """The price of a job. low_s and high_s: 10th and 90th percentile of the step.

    sources: where times of the busiest rank come from, and how much of them, in seconds.

    What a page shows besides, of a price that is exact: largest, what holds the fullest rank's
    memory; stage_saved_bytes, of a micro-batch, by stage; timelines, of a layer's two passes on
    their streams.
    """

    job: PretrainJob
    cluster: str
    num_ranks: int
    step_s: float
    low_s: float
    high_s: float
    tokens_per_step: int
    flops_per_token: float
    peak_flops_per_s: float
    memory_limit_bytes: int
    num_micro_batches: int
    parts: TimeParts
    classes: tuple[RankClass, ...]
    sources: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()
    run: PipelineRun | None = field(default=None, repr=False, compare=False)
    largest: tuple[Owner, ...] = field(default=(), repr=False)
    stage_saved_bytes: tuple[float, ...] = field(default=(), repr=False)
    timelines: tuple[tuple[str, Timeline], ...] = field(default=(), repr=False, compare=False)

    @property
    def tokens_per_s(self) -> float:
        """Of the whole cluster."""
        return self.tokens_per_step / self.step_s

    @property
    def model_flops_per_s(self) -> float:
        """Of one rank, without what is computed again."""
        return self.tokens_per_s * self.flops_per_token / self.num_ranks

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization."""
        return self.model_flops_per_s / self.peak_flops_per_s

    @property
    def fullest(self) -> RankClass:
        """The class that needs most memory."""
        return max(self.classes, key=lambda each: each.ledger.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return self.fullest.ledger.total_bytes

    @property
    def fits(self) -> bool:
        """Whether every rank has the memory, and PyTorch's allocator finds room in it."""
        return self.peak_bytes <= self.memory_limit_bytes and self._fragmented is None

    @property
    def _fragmented(self) -> RankClass | None:
        """A class whose allocator asks for more than there is."""
        found = (each for each in self.classes if each.fragments and not each.fragments.fixed.fits)
        return next(found, None)

    def missing(self) -> str:
        """What the fullest rank lacks, and where its memory goes."""
        if self.peak_bytes > self.memory_limit_bytes or self._fragmented is None:
            return missing(self.fullest, self.memory_limit_bytes)
        return self._fragmented.fragmented()

    @property
    def binding(self) -> str:
        """What holds the job back: memory that is missing, or the largest loss of time."""
        if not self.fits:
            return f"memory: {self.missing()}"
        losses = [each for each in self.parts.shares() if each[0] not in ("matrix products",)]
        name, loss_s = max(losses, key=lambda each: each[1])
        return f"{name}: {loss_s / self.step_s:.0%} of the step"

    def dollars_per_billion_tokens(self, dollars_per_rank_hour: float) -> float:
        """What a billion tokens cost at this price of a rank."""
        hours = 1e9 / self.tokens_per_s / 3600
        return hours * self.num_ranks * dollars_per_rank_hour

    def to_dict(self, dollars_per_rank_hour: float | None = None) -> dict[str, Any]:
        """For JSON: SI units, bytes."""
        found: dict[str, Any] = {
            "job": self.job.name,
            "cluster": self.cluster,
            "num_ranks": self.num_ranks,
            "plan": asdict(self.job.plan),
            "micro_batch_size": self.job.micro_batch_size,
            "num_micro_batches": self.num_micro_batches,
            "step_s": self.step_s,
            "interval_s": [self.low_s, self.high_s],
            "tokens_per_s": self.tokens_per_s,
            "mfu": self.mfu,
            "model_flops_per_s_per_rank": self.model_flops_per_s,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "binding": self.binding,
            "parts_s": asdict(self.parts),
            "sources_s": dict(self.sources),
            "classes": [
                {
                    "pipeline_ranks": list(each.pipeline_ranks),
                    "num_ranks": each.num_ranks,
                    "stages": [dict(stage) for stage in each.stages],
                    "in_flight": each.in_flight,
                    "ledger_bytes": each.ledger.bytes_by_kind,
                    "peak_bytes": each.ledger.total_bytes,
                    "first_step_peak_bytes": each.ledger.first_step_bytes,
                    "reserved": None if each.fragments is None else asdict(each.fragments),
                }
                for each in self.classes
            ],
            "largest": [asdict(each) for each in self.largest],
            "notes": list(self.notes),
        }
        if dollars_per_rank_hour is not None:
            found["dollars_per_billion_tokens"] = self.dollars_per_billion_tokens(
                dollars_per_rank_hour
            )
        return found
