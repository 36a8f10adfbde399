"""Small models of the families that must compile exactly: random weights, dropout, labels.

Each function returns a model in training mode and the keyword arguments of one training step. The
Hugging Face models are unmodified; four layers, so that blocks repeat.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from plait.models.decoder import Decoder, DecoderConfig
from plait.models.registry import FAMILIES as ARCHITECTURES
from plait.nn.experts import ExpertSettings
from plait.nn.latent_attention import LatentSettings
from plait.nn.rotary import Rope
from plait.train.step import summed_loss
from tests.models.test_families import PANGU
from tests.models.tiny_families import CONFIGS

Family = tuple[nn.Module, dict[str, Tensor]]

VOCABULARY = 131
CAUSAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CAUSAL_DROPOUT = CAUSAL | {"attention_dropout": 0.1, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


class TrainingLoss(nn.Module):
    """A plait decoder with its loss, as `plait train` computes it."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype):
        super().__init__()
        self.decoder = Decoder(config)
        self.decoder.initialize()
        self.dtype = dtype

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Return the loss, and hidden states that the loss is not made of."""
        loss = summed_loss(self.decoder, tokens[:, :-1], tokens[:, 1:], dtype=self.dtype)
        return {"loss": loss, "hidden": self.decoder(tokens[:1, :4])}


def plait_llama() -> Family:
    """Llama, float32."""
    return _plait("llama", torch.float32)


def plait_llama_autocast() -> Family:
    """Llama under bfloat16 autocast."""
    return _plait("llama", torch.bfloat16)


def plait_qwen3() -> Family:
    """Qwen3, float32, tied embeddings."""
    return _plait("qwen3", torch.float32, tie_embeddings=True)


def plait_qwen3_autocast() -> Family:
    """Qwen3 under bfloat16 autocast."""
    return _plait("qwen3", torch.bfloat16)


def plait_gemma2() -> Family:
    """Gemma 2: local and global layers in turn, soft caps on scores and logits."""
    caps = {"attention_soft_cap": 3.0, "logit_soft_cap": 4.0}
    gemma = {"norm": "rms_plus_one", "norm_placement": "both", "activation": "gelu_tanh"}
    windows = {"sliding_window": 8, "full_layers": (1, 3), "scale_embeddings": True}
    return _plait("gemma2", torch.float32, **caps, **gemma, **windows, tie_embeddings=True)


def plait_gemma3_autocast() -> Family:
    """Gemma 3 under bfloat16 autocast: two rotations."""
    gemma = {"norm": "rms_plus_one", "norm_placement": "both", "activation": "gelu_tanh"}
    windows = {"sliding_window": 8, "full_layers": (2,), "local_rope": Rope(theta=100.0)}
    return _plait("gemma3_text", torch.bfloat16, **gemma, **windows, scale_embeddings=True)


def plait_gpt2() -> Family:
    """GPT-2: learned positions, fused projections, layer norms."""
    kinds = {"norm": "layer", "positions": "learned", "feed_forward": "plain"}
    biases = dict.fromkeys(("attention_bias", "output_bias", "feed_forward_bias"), True)
    fused = {"fused_attention": True, "num_kv_heads": 4, "activation": "gelu_tanh"}
    return _plait("gpt2", torch.float32, **kinds, **biases, **fused, tie_embeddings=True)


def plait_mixtral() -> Family:
    """Mixtral: experts in every layer."""
    experts = ExpertSettings(num_experts=4, experts_per_token=2, intermediate_size=96)
    return _plait("mixtral", torch.float32, experts=experts)


def plait_mixtral_autocast() -> Family:
    """Mixtral under bfloat16 autocast."""
    experts = ExpertSettings(num_experts=4, experts_per_token=2, intermediate_size=96)
    return _plait("mixtral", torch.bfloat16, experts=experts)


def plait_deepseek_v3() -> Family:
    """DeepSeek-V3: latent attention, a dense layer, groups of experts, a shared one."""
    latent = LatentSettings(
        query_rank=24, rank=16, plain_size=12, rotary_size=8, value_size=12, interleaved=True
    )
    experts = ExpertSettings(
        num_experts=8,
        experts_per_token=2,
        intermediate_size=32,
        router="sigmoid",
        num_groups=4,
        groups_per_token=2,
        router_float32=True,
        shared_intermediate_size=32,
        dense_layers=(0,),
    )
    return _plait("deepseek_v3", torch.float32, latent=latent, experts=experts)


OF_CONFIGS = {
    "MistralForCausalLM": "mistral-window",
    "Qwen2ForCausalLM": "qwen2-yarn",
    "Qwen3MoeForCausalLM": "qwen3-experts",
    "Phi3ForCausalLM": "phi3-long-partial",
    "Olmo2ForCausalLM": "olmo2",
    "SmolLM3ForCausalLM": "smollm3",
    "DeepseekV2ForCausalLM": "deepseek-v2-groups",
}
"""Families of ours that are read from a `config.json`, and which of the tiny ones it is."""


def plait_of(architecture: str) -> Family:
    """A family of ours, read from a tiny `config.json`, float32."""
    if architecture in OF_CONFIGS:
        settings = CONFIGS[OF_CONFIGS[architecture]]().to_dict()
    else:
        settings = PANGU | {"vocab_size": VOCABULARY}
    config = ARCHITECTURES[architecture].read_config(settings)
    return TrainingLoss(config, torch.float32), {"tokens": _tokens(2, 18)}


def llama() -> Family:
    """Grouped queries, dropout of the attention."""
    return _causal(hf.LlamaForCausalLM(hf.LlamaConfig(**CAUSAL_DROPOUT)))


def qwen3() -> Family:
    """Normalized queries and keys."""
    return _causal(hf.Qwen3ForCausalLM(hf.Qwen3Config(**CAUSAL_DROPOUT, head_dim=16)))


def mistral() -> Family:
    """A sliding window shorter than the text."""
    return _causal(hf.MistralForCausalLM(hf.MistralConfig(**CAUSAL_DROPOUT, sliding_window=8)))


def gemma2() -> Family:
    """Local and global layers in turn, soft caps."""
    config = hf.Gemma2Config(**CAUSAL_DROPOUT, head_dim=16, sliding_window=8)
    return _causal(hf.Gemma2ForCausalLM(config))


def phi3() -> Family:
    """Fused projections, dropout of residual and embedding."""
    config = hf.Phi3Config(**CAUSAL_DROPOUT, resid_pdrop=0.1, embd_pdrop=0.1)
    return _causal(hf.Phi3ForCausalLM(config))


def gpt2() -> Family:
    """Dropout everywhere."""
    return _gpt2(4)


def gpt2_scaled_by_layer() -> Family:
    """Twelve layers, each with its number in its arithmetic."""
    return _gpt2(12, scale_attn_by_inverse_layer_idx=True)


def mixtral() -> Family:
    """Experts."""
    config = hf.MixtralConfig(**CAUSAL_DROPOUT, num_local_experts=4, num_experts_per_tok=2)
    return _causal(hf.MixtralForCausalLM(config))


def bert() -> Family:
    """A masked language model."""
    return _masked(hf.BertForMaskedLM(hf.BertConfig(**ENCODER)))


def modernbert() -> Family:
    """No norm before the first attention, where other layers have one."""
    # PyTorch keeps no guard on the kind of a layer's children that would tell them apart.
    config = hf.ModernBertConfig(**ENCODER, local_attention=8, pad_token_id=0)
    return _masked(hf.ModernBertForMaskedLM(config))


def exaone4() -> Family:
    """Global layers without rotary embedding: keys go from their norm into the cache."""
    return _causal(hf.Exaone4ForCausalLM(hf.Exaone4Config(**CAUSAL_DROPOUT, sliding_window=8)))


def doge() -> Family:
    """Masks that are learnt, through softplus."""
    return _causal(hf.DogeForCausalLM(hf.DogeConfig(**CAUSAL)))


def jetmoe() -> Family:
    """A break inside of every layer, between its norm and its residual connection."""
    sizes = {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = CAUSAL | {"num_hidden_layers": 2, "num_key_value_heads": 2} | sizes
    return _causal(hf.JetMoeForCausalLM(hf.JetMoeConfig(**config)))


def albert() -> Family:
    """One layer's weights, four times."""
    config = hf.AlbertConfig(
        **ENCODER, embedding_size=32, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    return _masked(hf.AlbertForMaskedLM(config))


def vit() -> Family:
    """Images."""
    shape = {key: ENCODER[key] for key in ENCODER if key.startswith(("hidden", "inter", "num"))}
    config = hf.ViTConfig(
        **shape,
        image_size=32,
        patch_size=8,
        num_labels=5,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    model = hf.ViTForImageClassification(config).train()
    return model, {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 3])}


def t5() -> Family:
    """Encoder and decoder; the position bias of the first layer is used by all."""
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=4,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return _translate(hf.T5ForConditionalGeneration(config))


def bart() -> Family:
    """Encoder and decoder; every decoder layer reads the encoder's output."""
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 4, "attention_heads": 4, "ffn_dim": 96}.items()
    }
    config = hf.BartConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        max_position_embeddings=64,
        attention_dropout=0.1,
        activation_dropout=0.1,
        **sides,
    )
    return _translate(hf.BartForConditionalGeneration(config))


FAMILIES: Mapping[str, Callable[[], Family]] = {
    function.__name__: function
    for function in (
        plait_llama,
        plait_llama_autocast,
        plait_qwen3,
        plait_qwen3_autocast,
        plait_gemma2,
        plait_gemma3_autocast,
        plait_gpt2,
        plait_mixtral,
        plait_mixtral_autocast,
        plait_deepseek_v3,
        llama,
        qwen3,
        mistral,
        gemma2,
        phi3,
        gpt2,
        gpt2_scaled_by_layer,
        mixtral,
        exaone4,
        doge,
        jetmoe,
        bert,
        modernbert,
        albert,
        vit,
        t5,
        bart,
    )
} | {
    f"plait_{ARCHITECTURES[name].name.lower()}": partial(plait_of, name)
    for name in (*OF_CONFIGS, "PanguEmbeddedForCausalLM")
}


def _plait(family: str, dtype: torch.dtype, **options: Any) -> Family:
    config = DecoderConfig(
        family=family,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_layers=4,
        num_heads=4,
        head_size=16,
        max_positions=64,
        qk_norm=family in ("qwen3", "gemma3_text"),
        **{"num_kv_heads": 2, **options},
    )
    return TrainingLoss(config, dtype), {"tokens": _tokens(2, 18)}


def _gpt2(num_layers: int, **options: Any) -> Family:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=64,
        n_layer=num_layers,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return _causal(hf.GPT2LMHeadModel(config))


def _causal(model: nn.Module) -> Family:
    tokens = _tokens(2, 17)
    return model.train(), {"input_ids": tokens, "labels": tokens.clone(), "use_cache": False}


def _masked(model: nn.Module) -> Family:
    tokens = _tokens(2, 17)
    labels = tokens.masked_fill(torch.rand(tokens.shape) > 0.3, -100)
    mask = torch.ones_like(tokens)
    mask[1, 12:] = 0
    return model.train(), {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def _translate(model: nn.Module) -> Family:
    arguments = {"input_ids": _tokens(2, 17), "labels": _tokens(2, 11), "use_cache": False}
    return model.train(), arguments


def _tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCABULARY, shape)
