"""Rotary positions in a `config.json`: read in the form of transformers 5 or of those before it."""

from collections.abc import Mapping
from typing import Any

from plait.errors import ModelError, nearest_name
from plait.nn.rotary import Rope

_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


def parse_rope(
    settings: Mapping[str, Any], *, given: Mapping[str, Any] | None = None, theta: float = 10_000.0
) -> Rope:
    """Read the rotation from `rope_parameters` (transformers 5), or from the keys before it.

    given: the group to read, if it is not the one at the top. theta: default of the family.
    """
    if given is None:
        return parse_rope(settings, given=_rope_group(settings), theta=theta)
    theta = given.get("rope_theta") or settings.get("rope_theta") or theta
    fraction = given.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0
    kind = given.get("rope_type") or given.get("type") or "default"
    match kind:
        case "default":
            return Rope(theta=theta, fraction=fraction)
        case "linear":
            return Rope(theta=theta, fraction=fraction, kind="linear", factor=given["factor"])
        case "llama3":
            return Rope(
                theta=theta,
                fraction=fraction,
                kind="llama3",
                factor=given["factor"],
                low_freq_factor=given["low_freq_factor"],
                high_freq_factor=given["high_freq_factor"],
                original_max_positions=given["original_max_position_embeddings"],
            )
        case "yarn":
            return Rope(
                theta=theta,
                fraction=fraction,
                kind="yarn",
                factor=given["factor"],
                original_max_positions=given["original_max_position_embeddings"],
                beta_fast=given.get("beta_fast") or 32.0,
                beta_slow=given.get("beta_slow") or 1.0,
                attention_factor=given.get("attention_factor"),
                mscale=given.get("mscale") or 0.0,
                mscale_all_dim=given.get("mscale_all_dim") or 0.0,
            )
        case "longrope" | "su":
            return _parse_longrope(settings, given, theta=theta, fraction=fraction)
    raise ModelError(f"rope type {kind!r} is not supported. {nearest_name(str(kind), _KINDS)}")


def _rope_group(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    return settings.get("rope_parameters") or settings.get("rope_scaling") or {}


def _parse_longrope(
    settings: Mapping[str, Any], given: Mapping[str, Any], *, theta: float, fraction: float
) -> Rope:
    key = "original_max_position_embeddings"
    old = given.get(key) or settings[key]
    return Rope(
        theta=theta,
        fraction=fraction,
        kind="longrope",
        factor=given.get("factor") or max(1.0, settings["max_position_embeddings"] / old),
        original_max_positions=old,
        short_factors=tuple(map(float, given["short_factor"])),
        long_factors=tuple(map(float, given["long_factor"])),
        attention_factor=given.get("attention_factor"),
    )


def unparse_rope(rope: Rope) -> dict[str, Any] | None:
    """Undo `parse_rope`, in the form that all versions of transformers read; theta goes beside."""
    old = {"original_max_position_embeddings": rope.original_max_positions}
    scaled: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.attention_factor is not None:
        scaled["attention_factor"] = rope.attention_factor
    match rope.kind:
        case "default":
            return None
        case "linear":
            return scaled
        case "llama3":
            high_low = {
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
            }
            return scaled | high_low | old
        case "yarn":
            mscales = {
                name: value
                for name, value in (
                    ("mscale", rope.mscale),
                    ("mscale_all_dim", rope.mscale_all_dim),
                )
                if value
            }
            betas = {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
            return scaled | betas | mscales | old
        case "longrope":
            factors = {
                "short_factor": list(rope.short_factors),
                "long_factor": list(rope.long_factors),
            }
            return scaled | factors | old
