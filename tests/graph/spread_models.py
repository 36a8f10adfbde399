"""Small models of every family that can be spread, and a loss of each."""

from collections.abc import Callable
from dataclasses import replace

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from plait.models.decoder import Decoder, DecoderConfig
from plait.nn.experts import ExpertSettings
from plait.nn.latent_attention import LatentSettings

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def own(**settings) -> nn.Module:
    config = DecoderConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_layers=settings.pop("num_layers", 2),
        num_heads=8,
        num_kv_heads=settings.pop("num_kv_heads", 4),
        head_size=settings.pop("head_size", 8),
        max_positions=64,
        **settings,
    )
    return _drawn(Decoder(config))


def hugging_face(family: str, **settings) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **settings})
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return _drawn(getattr(transformers, head)(config))


EXPERTS = ExpertSettings(num_experts=4, experts_per_token=2, intermediate_size=32)
LATENT = LatentSettings(query_rank=24, rank=16, plain_size=8, rotary_size=8, value_size=16)
OWN_FAMILIES: dict[str, dict] = {
    "gemma2": {
        "family": "gemma2",
        "norm": "rms_plus_one",
        "norm_placement": "both",
        "activation": "gelu_tanh",
        "attention_soft_cap": 50.0,
        "logit_soft_cap": 30.0,
        "scale_embeddings": True,
        "tie_embeddings": True,
        "sliding_window": 8,
        "full_layers": (1,),
    },
    "phi3": {"family": "phi3", "fused_attention": True, "feed_forward": "gated_fused"},
    "olmo2": {
        "family": "olmo2",
        "norm_placement": "after",
        "qk_norm": True,
        "qk_norm_span": "all_heads",
    },
    "gpt2": {
        "family": "gpt2",
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu_tanh",
        "feed_forward": "plain",
        "attention_bias": True,
        "output_bias": True,
        "feed_forward_bias": True,
        "num_kv_heads": 8,
        "tie_embeddings": True,
    },
    "mixtral": {"family": "mixtral", "experts": EXPERTS},
    "deepseek_v3": {
        "family": "deepseek_v3",
        "latent": LATENT,
        "num_kv_heads": 8,
        "experts": replace(
            EXPERTS,
            router="sigmoid",
            num_groups=2,
            groups_per_token=1,
            shared_intermediate_size=48,
            dense_layers=(0,),
        ),
    },
}


def _drawn(model: nn.Module) -> nn.Module:
    """Weights far from zero and from each other, so that nothing wrong can hide."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        matrix = parameter.dim() > 1
        nn.init.normal_(parameter, mean=0 if matrix else 1, std=0.15, generator=generator)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "our_llama": lambda: own(),
    "our_llama_with_biases": lambda: own(attention_bias=True, feed_forward_bias=True),
    "our_llama_strict": lambda: own(numerics="strict"),
    "our_qwen3": lambda: own(family="qwen3", qk_norm=True, tie_embeddings=True),
    **{f"our_{family}": lambda s=settings: own(**s) for family, settings in OWN_FAMILIES.items()},
    "llama": lambda: hugging_face("Llama"),
    "qwen3": lambda: hugging_face("Qwen3", head_dim=16, tie_word_embeddings=True),
    "mistral": lambda: hugging_face("Mistral", sliding_window=8),
    "gpt2": lambda: hugging_face("GPT2", **NO_DROPOUT),
    "phi3": lambda: hugging_face("Phi3", pad_token_id=0),
    "olmo2": lambda: hugging_face("Olmo2", pad_token_id=0),
    "gemma2": lambda: hugging_face("Gemma2", head_dim=16, sliding_window=8),
    "mixtral": lambda: hugging_face("Mixtral", num_local_experts=4),
}


def tokens(num_tokens: int = 16) -> Tensor:
    return torch.randint(0, 96, (2, num_tokens), generator=torch.Generator().manual_seed(1))


def loss(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    if isinstance(model, Decoder):
        return model.loss(model(tokens_BT), tokens_BT.roll(-1, 1)) / tokens_BT.numel()
    logits_BTV = model(tokens_BT, use_cache=False).logits
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
