"""The families, by the architecture name in `config.json`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plait.errors import ModelError, nearest_name
from plait.models import (
    deepseek,
    gemma,
    gpt2,
    llama,
    mistral,
    mixtral,
    olmo2,
    pangu,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from plait.models.decoder import Decoder
from plait.models.decoder_config import DecoderConfig
from plait.models.family import Family

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "MistralForCausalLM": mistral.FAMILY,
    "Qwen2ForCausalLM": qwen2.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
    "Qwen3MoeForCausalLM": qwen3.WITH_EXPERTS,
    "Gemma2ForCausalLM": gemma.GEMMA_2,
    "Gemma3ForCausalLM": gemma.GEMMA_3,
    "Phi3ForCausalLM": phi3.FAMILY,
    "Olmo2ForCausalLM": olmo2.FAMILY,
    "GPT2LMHeadModel": gpt2.FAMILY,
    "MixtralForCausalLM": mixtral.FAMILY,
    "SmolLM3ForCausalLM": smollm3.FAMILY,
    "DeepseekV2ForCausalLM": deepseek.DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": deepseek.DEEPSEEK_V3,
    "PanguEmbeddedForCausalLM": pangu.FAMILY,
}


def family_of_config(settings: Mapping[str, Any]) -> Family:
    """Find the family that a `config.json` names; raises ModelError with the nearest known one."""
    names = settings.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    given = names[0] if names else "none"
    raise ModelError(
        f"config.json names the architecture {given!r}. {nearest_name(given, FAMILIES)}"
    )


def family_of_model(model: Decoder) -> Family:
    """Find the family that a model was made for; raises ModelError as `check_family` does."""
    return check_family(model.config)


def check_family(config: DecoderConfig) -> Family:
    """Find the family of a config; ModelError if it is unknown or cannot express the config."""
    by_name = {family.name: family for family in FAMILIES.values()}
    if config.family not in by_name:
        raise ModelError(
            f"model.family={config.family!r} is not known. {nearest_name(config.family, by_name)}"
        )
    family = by_name[config.family]
    # How the sums are taken is no part of the architecture, and of no config.json.
    again = replace(family.read_config(family.write_config(config)), numerics=config.numerics)
    if again != config:
        fields = [name for name, value in vars(again).items() if value != getattr(config, name)]
        raise ModelError(
            f"a {config.family} model cannot have this {', '.join(fields)}; "
            f"its config.json would say {', '.join(str(getattr(again, f)) for f in fields)}."
        )
    return family
