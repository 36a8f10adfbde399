"""Find the best plan of a Hugging Face model on 1,024 GPUs, on a laptop, and read why."""

from transformers import Qwen3Config

from plait.cost.accelerators import find_cluster
from plait.dryrun.job_report import job_report
from plait.dryrun.legal_plans import describe
from plait.dryrun.model_source import hugging_face_source
from plait.dryrun.pretrain_job import PretrainJob
from plait.dryrun.search import search

# The shape of Qwen3-32B; its weights are never made. Any causal model of transformers will do.
config = Qwen3Config(
    vocab_size=151_936,
    hidden_size=5120,
    intermediate_size=25_600,
    num_hidden_layers=64,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
)
job = PretrainJob(name="qwen3_32b", sequence_length=8192, batch_size=1024)
result = search(
    job,
    find_cluster("h100", 1024),
    memory_bytes=72 * 2**30,
    source=hugging_face_source(config, "qwen3_32b"),
    micro_batch_sizes=(1,),
    top=3,
)
print(
    f"{result.num_candidates:,} legal plans; {result.num_priced:,}, with variants of the best, "
    "fit and are priced"
)
for number, each in enumerate(result.best[:3], start=1):
    print(
        f"{number}. {each.price.step_s:.2f} s, MFU {each.price.mfu:.1%}: {describe(each.candidate)}"
    )
print()
print(job_report(result.best[0].price, dollars_per_rank_hour=2.5))
print()
print(result.explain(1, len(result.best)))
