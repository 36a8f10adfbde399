"""The families, by the architecture name in `config.json`."""

from collections.abc import Mapping
from typing import Any

from plait.errors import ModelError, nearest_name
from plait.models import llama, qwen3
from plait.models.decoder import Decoder
from plait.models.family import Family

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": llama.FAMILY,
    "Qwen3ForCausalLM": qwen3.FAMILY,
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
    """Find the family that a model was made for."""
    for family in FAMILIES.values():
        if family.name == model.config.family:
            return family
    names = [family.name for family in FAMILIES.values()]
    raise ModelError(
        f"family={model.config.family!r} is not known. {nearest_name(model.config.family, names)}"
    )
