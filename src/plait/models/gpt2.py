"""GPT-2: learned positions, layer norms, biases everywhere [Radford et al. 2019]."""

from collections.abc import Mapping
from typing import Any

from plait.errors import ModelError
from plait.models.decoder_config import DecoderConfig
from plait.models.family import Family, parse_activation
from plait.models.naming import Naming

_WORDS = (
    ("embed_tokens.", "wte."),
    ("embed_positions.", "wpe."),
    ("layers.", "h."),
    ("self_attn.qkv_proj", "attn.c_attn"),
    ("self_attn.o_proj", "attn.c_proj"),
    ("input_layernorm", "ln_1"),
    ("post_attention_layernorm", "ln_2"),
    ("mlp.up_proj", "mlp.c_fc"),
    ("mlp.down_proj", "mlp.c_proj"),
    ("norm.", "ln_f."),
)
# Layers scaled by their number, and scores computed another way in mixed precision: no published
# GPT-2 has them.
_PLAIN = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
_PLAIN |= {"add_cross_attention": False, "reorder_and_upcast_attn": False}


def _parse(settings: Mapping[str, Any]) -> DecoderConfig:
    for key, value in _PLAIN.items():
        if settings.get(key, value) != value:
            raise ModelError(f"{key}={settings[key]} is not supported for GPT-2.")
    width, num_heads = settings["n_embd"], settings["n_head"]
    return DecoderConfig(
        family="gpt2",
        vocab_size=settings["vocab_size"],
        hidden_size=width,
        intermediate_size=settings.get("n_inner") or 4 * width,
        num_layers=settings["n_layer"],
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=width // num_heads,
        max_positions=settings["n_positions"],
        norm="layer",
        norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        positions="learned",
        attention_bias=True,
        output_bias=True,
        feed_forward_bias=True,
        fused_attention=True,
        feed_forward="plain",
        activation=parse_activation(settings.get("activation_function", "gelu_new")),
        tie_embeddings=settings.get("tie_word_embeddings", True),
        init_std=settings.get("initializer_range", 0.02),
    )


def _unparse(config: DecoderConfig) -> dict[str, Any]:
    activation = "gelu_new" if config.activation == "gelu_tanh" else config.activation
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activation,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        **dropouts,
    }


FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    title="GPT-2",
    features="learned positions, layer norms, biases",
    own_keys=frozenset(
        {"vocab_size", "n_embd", "n_inner", "n_layer", "n_head", "n_positions", "n_ctx"}
        | {"layer_norm_epsilon", "activation_function", "tie_word_embeddings"}
        | {"summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout"}
        | {"summary_proj_to_labels", *_PLAIN}
    ),
    parse=_parse,
    unparse=_unparse,
    naming=Naming(
        prefix="transformer.",
        words=_WORDS,
        transposed=(
            "self_attn.qkv_proj.weight",
            "self_attn.o_proj.weight",
            "mlp.up_proj.weight",
            "mlp.down_proj.weight",
        ),
        # Causal masks that old files carry along.
        ignored=(r"\.attn\.bias$", r"\.attn\.masked_bias$"),
    ),
)
