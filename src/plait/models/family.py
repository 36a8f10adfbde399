"""What a family must say: how its `config.json` and parameter names map to a `Decoder`."""

import difflib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from plait.errors import ModelError, nearest_name
from plait.models.decoder import DecoderConfig
from plait.nn.rotary import Rope

_TYPO_SIMILARITY = 0.9
"""A key this close to a known one is a slip of the pen; keys further away are somebody's own."""

# Keys of config.json that do not change what the model computes.
_NEUTRAL_KEYS = frozenset(
    {"architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
    | {"use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tokenizer_class", "auto_map"}
    | {"return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward"}
    | {"is_encoder_decoder", "id2label", "label2id", "problem_type", "task_specific_params"}
    | {"pretraining_tp", "initializer_range", "attention_dropout"}
    | {"_attn_implementation", "attn_implementation"}
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One entry of the registry.

    architecture: the name in `config.json`'s "architectures". own_keys: keys of `config.json` that
    `read_config` understands. Checkpoint names differ from ours by the leading "model." only.
    """

    name: str
    architecture: str
    own_keys: frozenset[str]
    parse: Callable[[Mapping[str, Any]], DecoderConfig]
    unparse: Callable[[DecoderConfig], dict[str, Any]]

    def read_config(self, settings: Mapping[str, Any]) -> DecoderConfig:
        """Make the `DecoderConfig` of a parsed `config.json`.

        Raises ModelError for a key that is missing, looks misspelt, or asks for what is not
        supported; warns of keys that are unknown.
        """
        unknown = [key for key in settings if key not in self.own_keys | _NEUTRAL_KEYS]
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
            **self.unparse(config),
        }

    def to_checkpoint_name(self, name: str) -> str:
        """Name of one of our parameters in a checkpoint."""
        return name if name.startswith("lm_head.") else f"model.{name}"

    def from_checkpoint_name(self, name: str) -> str:
        """Undo `to_checkpoint_name`."""
        return name.removeprefix("model.")


COMMON_KEYS = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"}
    | {"num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias"}
    | {"max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"}
    | {"rms_norm_eps", "tie_word_embeddings"}
)
"""Keys that Llama-like families share; `parse_common` and `unparse_common` handle them."""


def parse_common(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the common keys into arguments of `DecoderConfig`."""
    if (activation := settings.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ModelError(f"hidden_act={activation!r} is not supported; this family has silu.")
    num_heads = settings["num_attention_heads"]
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
        "rope": parse_rope(settings),
        "tie_embeddings": settings.get("tie_word_embeddings", False),
        "attention_bias": settings.get("attention_bias", False),
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
        "hidden_act": "silu",
    }


def parse_rope(settings: Mapping[str, Any]) -> Rope:
    """Read the rotation from `rope_parameters` (transformers 5), or from the keys before it."""
    given = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = given.get("rope_theta") or settings.get("rope_theta") or 10_000.0
    kind = given.get("rope_type") or given.get("type") or "default"
    match kind:
        case "default":
            return Rope(theta=theta)
        case "linear":
            return Rope(theta=theta, kind="linear", factor=given["factor"])
        case "llama3":
            return Rope(
                theta=theta,
                kind="llama3",
                factor=given["factor"],
                low_freq_factor=given["low_freq_factor"],
                high_freq_factor=given["high_freq_factor"],
                original_max_positions=given["original_max_position_embeddings"],
            )
    raise ModelError(
        f"rope type {kind!r} is not supported. "
        f"{nearest_name(str(kind), ['default', 'linear', 'llama3'])}"
    )


def unparse_rope(rope: Rope) -> dict[str, Any] | None:
    """Undo `parse_rope`, in the form that all versions of transformers read; theta goes beside."""
    match rope.kind:
        case "default":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": rope.factor}
        case "llama3":
            return {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_positions,
            }
