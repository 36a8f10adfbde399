"""A job that is priced in a second."""

from plait.dryrun.pretrain_job import PretrainJob
from plait.models.decoder_config import DecoderConfig
from plait.plan.parallel_plan import ParallelPlan

CONFIG = DecoderConfig(
    vocab_size=4096,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_size=64,
    max_positions=2048,
)
JOB = PretrainJob(
    name="small",
    model=CONFIG,
    plan=ParallelPlan(fsdp=8),
    sequence_length=1024,
    batch_size=64,
    gradient_bytes=4,
)
