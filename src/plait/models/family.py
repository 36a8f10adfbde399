"""What a family must say: how its `config.json` and its checkpoints map to a `Decoder`."""

import difflib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from plait.errors import ModelError, nearest_name
from plait.models.decoder_config import DecoderConfig
from plait.models.naming import Naming
from plait.models.rope_settings import parse_rope, unparse_rope
from plait.nn.feed_forward import Activation

_TYPO_SIMILARITY = 0.9
"""A key this close to a known one is a slip of the pen; keys further away are somebody's own."""

# Keys of config.json that do not change what the model computes.
_NEUTRAL_KEYS = frozenset(
    {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
    | {"use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tokenizer_class", "auto_map"}
    | {"return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"}
    | {"is_encoder_decoder", "id2label", "label2id", "problem_type", "task_specific_params"}
    | {"pretraining_tp", "initializer_range"}
    | {"_attn_implementation", "attn_implementation"}
)
# Regularizers of a past training run, which our models do not have.
_DROPOUTS = frozenset({"attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"})
# Values of keys that stand for something we do not compute; with other values they are neutral.
_REFUSED = {
    "quantization_config": "quantized weights are not read here; load the unquantized model.",
    "output_router_logits": "the router's loss is not computed; set it to false.",
    "router_jitter_noise": "the router's noise is not computed; set it to 0.",
    "use_bidirectional_attention": "attention is causal here; set it to false.",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One entry of the registry.

    name: its "model_type" in `config.json`; architecture: the name in "architectures". title: for
    people; features: what sets it apart, in a few words. own_keys: keys of `config.json` that
    `read_config` understands. is_in_transformers: whether `AutoModelForCausalLM` knows it.
    """

    name: str
    architecture: str
    title: str
    features: str
    own_keys: frozenset[str]
    parse: Callable[[Mapping[str, Any]], DecoderConfig]
    unparse: Callable[[DecoderConfig], dict[str, Any]]
    naming: Naming = field(default_factory=Naming)
    is_in_transformers: bool = True

    def read_config(self, settings: Mapping[str, Any]) -> DecoderConfig:
        """Make the `DecoderConfig` of a parsed `config.json`.

        Raises ModelError for a key that is missing, looks misspelt, or asks for what is not
        supported; warns of keys that are unknown.
        """
        for key, advice in _REFUSED.items():
            if settings.get(key):
                raise ModelError(f"config.json of {self.architecture}: {key} is set, but {advice}")
        if dropouts := sorted(key for key in _DROPOUTS if settings.get(key)):
            warnings.warn(
                f"config.json of {self.architecture}: there is no dropout here, so training goes "
                f"without {', '.join(dropouts)}",
                stacklevel=2,
            )
        known = self.own_keys | _NEUTRAL_KEYS | _DROPOUTS | _REFUSED.keys()
        unknown = [key for key in settings if key not in known]
        for key in unknown:
            if difflib.get_close_matches(key, self.own_keys, n=1, cutoff=_TYPO_SIMILARITY):
                hint = nearest_name(key, self.own_keys)
                raise ModelError(f"config.json of {self.architecture}: unknown key {key!r}. {hint}")
        if unknown:
            warnings.warn(
                f"config.json of {self.architecture}: keys without effect: {', '.join(unknown)}",
                stacklevel=2,
            )
        try:
            return self.parse(settings)
        except KeyError as error:
            raise ModelError(
                f"config.json of {self.architecture} lacks {error.args[0]!r}."
            ) from None

    def write_config(self, config: DecoderConfig) -> dict[str, Any]:
        """Make the `config.json` that `transformers` reads."""
        return {
            "architectures": [self.architecture],
            "model_type": self.name,
            "pad_token_id": None,  # some defaults lie beyond a small vocabulary
            **self.unparse(config),
        }


COMMON_KEYS = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"}
    | {"num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias"}
    | {"max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"}
    | {"rms_norm_eps", "tie_word_embeddings"}
)
"""Keys that Llama-like families share; `parse_common` and `unparse_common` handle them."""

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def parse_activation(name: str) -> Activation:
    """Translate a name of transformers; raises ModelError for one that is not known."""
    if name not in _ACTIVATIONS:
        raise ModelError(f"hidden_act={name!r} is not known. {nearest_name(name, _ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def unparse_activation(activation: Activation) -> str:
    """Undo `parse_activation`."""
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation


def parse_common(settings: Mapping[str, Any], *, theta: float = 10_000.0) -> dict[str, Any]:
    """Translate the common keys into arguments of `DecoderConfig`; theta: default of the family."""
    num_heads = settings["num_attention_heads"]
    bias = settings.get("attention_bias", False)
    return {
        "vocab_size": settings["vocab_size"],
        "hidden_size": settings["hidden_size"],
        "intermediate_size": settings["intermediate_size"],
        "num_layers": settings["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": settings.get("num_key_value_heads") or num_heads,
        "head_size": settings.get("head_dim") or settings["hidden_size"] // num_heads,
        "max_positions": settings["max_position_embeddings"],
        "norm_eps": settings.get("rms_norm_eps", 1e-6),
        "rope": parse_rope(settings, theta=theta),
        "tie_embeddings": settings.get("tie_word_embeddings", False),
        "attention_bias": bias,
        "output_bias": bias,
        "activation": parse_activation(settings.get("hidden_act", "silu")),
        "init_std": settings.get("initializer_range", 0.02),
    }


def unparse_common(config: DecoderConfig) -> dict[str, Any]:
    """Undo `parse_common`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": unparse_rope(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "initializer_range": config.init_std,
        "hidden_act": unparse_activation(config.activation),
    }


LAYER_TYPES = ("full_attention", "sliding_attention")


def parse_full_layers(layer_types: list[str]) -> tuple[int, ...]:
    """Numbers of the layers that see everything, from a list of layer types."""
    if unknown := set(layer_types) - set(LAYER_TYPES):
        raise ModelError(f"layer_types has {sorted(unknown)}; known: {', '.join(LAYER_TYPES)}.")
    return tuple(i for i, kind in enumerate(layer_types) if kind == LAYER_TYPES[0])


def unparse_layer_types(config: DecoderConfig) -> list[str]:
    """Undo `parse_full_layers`."""
    return [LAYER_TYPES[config.has_window(layer)] for layer in range(config.num_layers)]
