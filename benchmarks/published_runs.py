"""Public training runs: what was run, on what, and how fast it was, each with its source.

No figure of a device or link (`plait.cost`) was fitted to these runs: they were there before. Four
settings that the sources name were entered after the first comparison, and the interval's width was
chosen after it (docs/theory/dryrun.md, "Published runs"). Where a source leaves something open, the
choice made is said beside the run.

[L] Llama 3, arXiv 2407.21783, table 4; the 405B ran over RoCE, 400 Gb/s a GPU (section 3.3.1). How
    many stages a rank had is not published: as many as layers allow. MFU counts causal attention
    once here; the paper does not say how it counts.
[T] torchtitan, benchmarks/llama3_h100_202412_torchtitan.md at 31a17bfd: H100 with 96 GB HBM2e at
    2.4 TB/s and 500 W. train_configs/llama3_8b.toml: 8,192 tokens, per-operator checkpointing,
    AdamW in PyTorch's foreach form. Attention is PyTorch's FlashAttention-2.
[F] MosaicML, llm-foundry, scripts/train/benchmarking/README.md at 061f2c7c: MPT models in eager
    PyTorch with FSDP, full checkpointing where marked. Gradients travel in bfloat16 [composer,
    mosaic_fsdp_utils.py at 0099561e, get_mixed_precision]. Attention is FlashAttention in Triton
    (submit_benchmarks.py), the optimizer a loop of single operators; checkpointing is PyTorch's
    before 2.1, which runs the whole forward again.
[K] Korthikanti et al. 2022, arXiv 2205.05198, tables 3 and 5: Megatron-LM on A100, in float16.
    "full": each layer's forward runs again, no sequence parallelism; "sp": sequence parallelism,
    and attention's scores are computed again. Attention was not fused. The paper's tables could not
    be read again when this was last checked: the times agree with its abstract (29 % faster at
    530B) and, by its formula of model FLOPs, with the MFU that it states.

FlashAttention-2 reaches 35 % of an H100 [arXiv 2407.08608, abstract], the first one 25 to 40 % of
an A100 [arXiv 2307.08691, abstract; the middle is taken].
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from plait.cost.accelerators import ROCE_200, ROCE_400, a100
from plait.cost.clusters import Cluster, h100
from plait.dryrun.pretrain_job import PretrainJob
from plait.models.decoder_config import DecoderConfig
from plait.plan.parallel_plan import ParallelPlan, Pipeline, Recompute
from plait.recipes.pretrain import gpt_like, llama3_8b, llama3_405b

Unit = Literal["MFU", "tokens/s/GPU", "s"]
_FLASH_2_ON_H100, _FLASH_1_ON_A100 = 0.35, 0.33
_POWER_SHARE = (500 / 700) ** (1 / 3)
"""Clock under a limit of 500 W of 700: power grows as the cube of the clock, where voltage goes
with it [Chandrakasan et al. 1992, IEEE JSSC 27(4), equation 2]."""


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run, and what was published of it."""

    name: str
    source: str
    job: PretrainJob
    cluster: Cluster
    published: float
    unit: Unit


def _llama3(world: int, fsdp: int, mfu: float, *, cp: int = 1) -> PublishedRun:
    tokens = 8192 if cp == 1 else 131_072
    job = llama3_405b()
    plan = replace(job.plan, fsdp=fsdp, cp=cp)
    batch = 2048 if cp == 1 else 128
    return PublishedRun(
        name=f"Llama 3 405B, {world:,} H100, {tokens:,} tokens",
        source="L",
        job=replace(job, plan=plan, sequence_length=tokens, batch_size=batch),
        cluster=replace(h100(world), between=ROCE_400),
        published=mfu,
        unit="MFU",
    )


def _titan(world: int, rate: float, *, is_compiled: bool) -> PublishedRun:
    cluster = h100(world)
    device = replace(
        cluster.device,
        memory_bandwidth_bytes_per_s=2.4e12,
        memory_bytes=96 * 10**9,
        matrix_efficiency=cluster.device.matrix_efficiency * _POWER_SHARE,
        attention_efficiency=_FLASH_2_ON_H100 * _POWER_SHARE,
    )
    plan = ParallelPlan(fsdp=world, reshard=True, recompute=Recompute.ALTERNATE)
    job = replace(
        llama3_8b(),
        plan=plan,
        batch_size=2 * world,
        micro_batch_size=2,
        kernels="fused" if is_compiled else "eager",
        fused_optimizer=False,
    )
    return PublishedRun(
        name=f"Llama 3.1 8B, {world} H100 at 500 W, {'compiled' if is_compiled else 'eager'}",
        source="T",
        job=job,
        cluster=replace(cluster, device=device),
        published=rate,
        unit="tokens/s/GPU",
    )


_MPT = {
    "7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "70b": (8192, 80, 64),
}


def _mpt(
    size: str,
    make: Callable[[int], Cluster],
    world: int,
    micro_batch: int,
    count: int,
    rate: float,
    *,
    is_checkpointed: bool,
) -> PublishedRun:
    width, layers, heads = _MPT[size]
    cluster = make(world)
    share = _FLASH_2_ON_H100  # of the first, which can only be less, there is no figure
    if cluster.name == "a100":  # 1,600 Gb/s a node over RoCE
        cluster, share = replace(cluster, between=ROCE_200), _FLASH_1_ON_A100
    cluster = replace(cluster, device=replace(cluster.device, attention_efficiency=share))
    policy = Recompute.FULL if is_checkpointed else Recompute.NONE
    job = PretrainJob(
        name=f"mpt_{size}",
        model=gpt_like(width=width, layers=layers, heads=heads, vocab_size=50_368),
        plan=ParallelPlan(fsdp=world, reshard=True, recompute=policy),
        sequence_length=2048,
        batch_size=world * micro_batch * count,
        micro_batch_size=micro_batch,
        kernels="eager",
        gradient_bytes=2,
        fused_optimizer=False,
        reruns_all=True,
    )
    return PublishedRun(
        name=f"MPT {size}, {world} {cluster.name.upper()}, recompute {policy.value}",
        source="F",
        job=job,
        cluster=cluster,
        published=rate,
        unit="tokens/s/GPU",
    )


def _megatron(
    model: DecoderConfig, name: str, pp: int, batch: int, step_s: float, *, is_full: bool
) -> PublishedRun:
    world = 8 * pp
    per_rank = 1 if pp == 64 else 3
    plan = ParallelPlan(
        tp=8,
        sp=not is_full,
        pp=pp,
        pipeline=Pipeline.ONE_F_ONE_B if per_rank == 1 else Pipeline.INTERLEAVED,
        stages_per_rank=per_rank,
        recompute=Recompute.FULL if is_full else Recompute.NONE,
    )
    return PublishedRun(
        name=f"GPT {name}, {world} A100, {'full' if is_full else 'sp'}",
        source="K",
        job=PretrainJob(
            name=name,
            model=model,
            plan=plan,
            sequence_length=2048,
            batch_size=batch,
            attention="unfused" if is_full else "recomputed",
            reruns_all=is_full,
        ),
        cluster=a100(world),
        published=step_s,
        unit="s",
    )


_GPT_175B = gpt_like(width=12_288, layers=96, heads=96)
_GPT_530B = gpt_like(width=20_480, layers=105, heads=128)
_GPT_1T = gpt_like(width=25_600, layers=128, heads=160)

RUNS: tuple[PublishedRun, ...] = (
    _llama3(8192, 64, 0.43),
    _llama3(16_384, 128, 0.41),
    _llama3(16_384, 8, 0.38, cp=16),
    _titan(8, 5762, is_compiled=False),
    _titan(8, 6667, is_compiled=True),
    _titan(128, 5605, is_compiled=False),
    _titan(128, 6514, is_compiled=True),
    _mpt("7b", h100, 8, 6, 1, 10_643, is_checkpointed=False),
    _mpt("13b", h100, 8, 2, 1, 4792, is_checkpointed=False),
    _mpt("30b", h100, 32, 14, 3, 2308, is_checkpointed=True),
    _mpt("70b", h100, 64, 8, 4, 1039, is_checkpointed=True),
    _mpt("7b", a100, 8, 6, 2, 4641, is_checkpointed=False),
    _mpt("13b", a100, 8, 2, 3, 2262, is_checkpointed=False),
    _mpt("30b", a100, 8, 3, 21, 916, is_checkpointed=True),
    _mpt("70b", a100, 64, 8, 4, 410, is_checkpointed=True),
    _megatron(_GPT_175B, "175B", 8, 64, 18.13, is_full=True),
    _megatron(_GPT_175B, "175B", 8, 64, 13.75, is_full=False),
    _megatron(_GPT_530B, "530B", 35, 280, 49.05, is_full=True),
    _megatron(_GPT_530B, "530B", 35, 280, 37.83, is_full=False),
    _megatron(_GPT_1T, "1T", 64, 512, 94.42, is_full=True),
    _megatron(_GPT_1T, "1T", 64, 512, 71.49, is_full=False),
)
