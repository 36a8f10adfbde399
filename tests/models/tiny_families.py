"""Tiny random models of every family, as transformers makes them."""

from collections.abc import Callable, Mapping

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

SMALL = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.8],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    **EXPERTS,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
}
GPT_2 = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 199}
GPT_2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT_2 |= {"bos_token_id": 1, "eos_token_id": 2}

CONFIGS: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama2": lambda: LlamaConfig(**{**SMALL, "num_key_value_heads": 4}),
    "llama3-grouped": lambda: LlamaConfig(**SMALL, rope_theta=500_000.0, rms_norm_eps=1e-5),
    "llama3.1-scaled": lambda: LlamaConfig(**SMALL, rope_parameters=LLAMA_3_1),
    "llama-linear": lambda: LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama-biases-tied": lambda: LlamaConfig(
        **SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "llama-wide-heads": lambda: LlamaConfig(**SMALL, head_dim=32),
    "mistral-window": lambda: MistralConfig(**SMALL, sliding_window=7),
    "mistral-whole": lambda: MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-window": lambda: Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "qwen2-yarn": lambda: Qwen2Config(**SMALL, rope_parameters=YARN),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=16),
    "qwen3-tied": lambda: Qwen3Config(**SMALL, head_dim=24, tie_word_embeddings=True),
    "qwen3-experts": lambda: Qwen3MoeConfig(
        **SMALL, **EXPERTS, num_experts=6, norm_topk_prob=True, head_dim=16, mlp_only_layers=[1]
    ),
    "gemma2": lambda: Gemma2Config(
        **SMALL,
        head_dim=16,
        sliding_window=7,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL, head_dim=16, sliding_window=7, sliding_window_pattern=3, query_pre_attn_scalar=24
    ),
    "phi3": lambda: Phi3Config(**SMALL, sliding_window=7),
    "phi3-long-partial": lambda: Phi3Config(
        **{**SMALL, "hidden_size": 64},
        rope_parameters=LONG | {"partial_rotary_factor": 0.75},
        original_max_position_embeddings=16,
    ),
    "olmo2": lambda: Olmo2Config(**SMALL),
    "gpt2": lambda: GPT2Config(**GPT_2),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "smollm3": lambda: SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1]),
    "deepseek-v2": lambda: DeepseekV2Config(**LATENT, q_lora_rank=None),
    "deepseek-v2-groups": lambda: DeepseekV2Config(
        **LATENT,
        q_lora_rank=20,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.0,
        rope_parameters=YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
    ),
    "deepseek-v3": lambda: DeepseekV3Config(**LATENT, q_lora_rank=20, n_group=4, topk_group=2),
    "deepseek-v3-yarn": lambda: DeepseekV3Config(
        **LATENT,
        q_lora_rank=20,
        n_group=1,
        topk_group=1,
        rope_interleave=False,
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.8},
    ),
}


def make_reference(name: str, *, seed: int = 0) -> PreTrainedModel:
    """Build the model with random weights; norms, biases and buffers are random as well."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.add_(torch.randn_like(buffer) * 0.1)
    return model
