"""Small models of every family that can be spread, and a loss of each."""

from collections.abc import Callable

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from plait.models.decoder import Decoder, DecoderConfig

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
        num_kv_heads=4,
        head_size=8,
        max_positions=64,
        **settings,
    )
    return _drawn(Decoder(config))


def hugging_face(family: str, **settings) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **settings})
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    return _drawn(getattr(transformers, head)(config))


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
