"""Published models as jobs for the dry run: `plait price llama3_70b --world 1024 --cluster h100`.

Shapes are those of the models' `config.json` on Hugging Face and of the papers named. The plans are
starting points, not what the authors ran, unless a function says so.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from plait.dryrun.pretrain_job import PretrainJob
from plait.errors import ConfigError, nearest_name
from plait.models.decoder_config import DecoderConfig
from plait.nn.experts import ExpertSettings
from plait.nn.latent_attention import LatentSettings
from plait.nn.rotary import Rope
from plait.plan.parallel_plan import ParallelPlan, Pipeline, Recompute

_LLAMA_3 = DecoderConfig(
    vocab_size=128_256,
    num_kv_heads=8,
    max_positions=131_072,
    rope=Rope(theta=500_000.0),
)
_LLAMA_2 = DecoderConfig(vocab_size=32_000, max_positions=4096)


def llama3_8b() -> PretrainJob:
    """Llama 3 8B [arXiv 2407.21783, table 3]."""
    model = replace(
        _LLAMA_3, hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32
    )
    return PretrainJob(name="llama3_8b", model=model, sequence_length=8192, batch_size=1024)


def llama3_70b() -> PretrainJob:
    """Llama 3 70B [arXiv 2407.21783, table 3]."""
    model = replace(
        _LLAMA_3, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64
    )
    return PretrainJob(
        name="llama3_70b",
        model=model,
        plan=ParallelPlan(tp=8, sp=True, pp=4, fsdp=32),
        sequence_length=8192,
        batch_size=2048,
    )


def llama3_405b() -> PretrainJob:
    """Llama 3 405B with the plan of its first stage [arXiv 2407.21783, tables 3 and 4].

    16,384 GPUs: tp 8, pp 16, dp 128, 2,048 sequences of 8,192 tokens. A stage of a layer each, as
    the interleaved schedule of section 3.3.2 allows; how many the authors took is not published.
    """
    model = replace(
        _LLAMA_3, hidden_size=16_384, intermediate_size=53_248, num_layers=126, num_heads=128
    )
    plan = ParallelPlan(
        tp=8, sp=True, pp=16, fsdp=128, pipeline=Pipeline.INTERLEAVED, stages_per_rank=8
    )
    return PretrainJob(
        name="llama3_405b", model=model, plan=plan, sequence_length=8192, batch_size=2048
    )


def llama2_7b() -> PretrainJob:
    """Llama 2 7B [arXiv 2307.09288, appendix A.2.1]."""
    model = replace(
        _LLAMA_2,
        hidden_size=4096,
        intermediate_size=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
    )
    return PretrainJob(name="llama2_7b", model=model, sequence_length=4096, batch_size=1024)


def llama2_70b() -> PretrainJob:
    """Llama 2 70B [arXiv 2307.09288, appendix A.2.1]."""
    model = replace(
        _LLAMA_2,
        hidden_size=8192,
        intermediate_size=28_672,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
    )
    return PretrainJob(
        name="llama2_70b",
        model=model,
        plan=ParallelPlan(tp=8, sp=True, pp=4, fsdp=32),
        sequence_length=4096,
        batch_size=1024,
    )


def gpt3_175b() -> PretrainJob:
    """GPT-3 175B as in Megatron-LM: vocabulary 51,200, 2,048 tokens [arXiv 2205.05198, table 3]."""
    return PretrainJob(
        name="gpt3_175b",
        model=gpt_like(width=12_288, layers=96, heads=96),
        plan=ParallelPlan(tp=8, sp=True, pp=8, pipeline=Pipeline.INTERLEAVED, stages_per_rank=3),
        sequence_length=2048,
        batch_size=64,
    )


def mixtral_8x7b() -> PretrainJob:
    """Mixtral 8x7B [arXiv 2401.04088, table 1]."""
    model = DecoderConfig(
        family="mixtral",
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        max_positions=32_768,
        rope=Rope(theta=1e6),
        experts=ExpertSettings(num_experts=8, experts_per_token=2, intermediate_size=14_336),
    )
    return PretrainJob(
        name="mixtral_8x7b",
        model=model,
        plan=ParallelPlan(fsdp=64, ep=8, pp=4, reshard=True),
        sequence_length=4096,
        batch_size=1024,
    )


def deepseek_v3() -> PretrainJob:
    """DeepSeek-V3 without its further-token layer [arXiv 2412.19437, sections 3.2 and 4.2].

    2,048 GPUs: pp 16, ep 64, no tp, in DualPipeV here where the authors used DualPipe; 15,360
    sequences of 4,096 tokens. The authors' products were in float8; these are in bfloat16.
    """
    model = DecoderConfig(
        family="deepseek_v3",
        vocab_size=129_280,
        hidden_size=7168,
        intermediate_size=18_432,
        num_layers=61,
        num_heads=128,
        num_kv_heads=128,
        head_size=64,
        max_positions=163_840,
        experts=ExpertSettings(
            num_experts=256,
            experts_per_token=8,
            intermediate_size=2048,
            router="sigmoid",
            scale=2.5,
            num_groups=8,
            groups_per_token=4,
            router_float32=True,
            shared_intermediate_size=2048,
            dense_layers=(0, 1, 2),
        ),
        latent=LatentSettings(
            query_rank=1536, rank=512, plain_size=128, rotary_size=64, value_size=128
        ),
    )
    plan = ParallelPlan(
        pp=16,
        fsdp=128,
        ep=64,
        pipeline=Pipeline.DUAL_PIPE_V,
        stages_per_rank=2,
        recompute=Recompute.FULL,
    )
    return PretrainJob(
        name="deepseek_v3", model=model, plan=plan, sequence_length=4096, batch_size=15_360
    )


def gpt_like(*, width: int, layers: int, heads: int, vocab_size: int = 51_200) -> DecoderConfig:
    """A GPT of Megatron-LM's or MPT's shape: plain feed-forward of four widths, layer norms.

    With rotary positions and without biases, which cost next to nothing: so it has Llama's rules.
    """
    return DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_size=width // heads,
        max_positions=65_536,
        norm="layer",
        feed_forward="plain",
        activation="gelu_tanh",
    )


PRETRAIN_RECIPES: Mapping[str, Callable[[], PretrainJob]] = {
    "llama2_7b": llama2_7b,
    "llama2_70b": llama2_70b,
    "llama3_8b": llama3_8b,
    "llama3_70b": llama3_70b,
    "llama3_405b": llama3_405b,
    "gpt3_175b": gpt3_175b,
    "mixtral_8x7b": mixtral_8x7b,
    "deepseek_v3": deepseek_v3,
}


def find_pretrain_recipe(name: str) -> PretrainJob:
    """Make the job of a published model. Raises ConfigError with the nearest known name."""
    if name not in PRETRAIN_RECIPES:
        raise ConfigError(
            f"there is no recipe {name!r} of a large job. {nearest_name(name, PRETRAIN_RECIPES)}"
        )
    return PRETRAIN_RECIPES[name]()
