"""Adapters in the layout of PEFT: `adapter_config.json` and `adapter_model.safetensors`."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from plait.checkpoint.huggingface import read_tensor_file
from plait.checkpoint.json_file import read_json_object, write_json
from plait.errors import CheckpointError
from plait.models.decoder import Decoder
from plait.models.registry import family_of_model
from plait.nn.lora import LoraSettings, add_lora, lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_HALVES = ("lora_A", "lora_B")
# What would change the numbers if it were left out.
_UNSUPPORTED = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")
_UNSUPPORTED += ("layers_to_transform", "trainable_token_indices", "target_parameters")
_UNSUPPORTED += ("megatron_config", "layer_replication", "alora_invocation_tokens", "use_qalora")
# Other ways to begin (PiSSA, OLoRA, CorDA, LoftQ) change the frozen weights too.
_KNOWN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def write_adapter(
    model: Decoder, folder: Path, *, settings: LoraSettings, base_model: str = ""
) -> None:
    """Write the adapters of a model; base_model: the folder that PEFT should find the rest in."""
    naming = family_of_model(model).naming
    layers = dict(lora_layers(model))
    if not layers:
        raise CheckpointError("the model has no adapters to write.")
    theirs = {
        name: naming.to_checkpoint_name(f"{name}.weight").removesuffix(".weight") for name in layers
    }
    tensors = {
        f"{_PREFIX}{theirs[name]}.{half}.weight": layer.get_submodule(half).get_parameter("weight")
        for name, layer in layers.items()
        for half in _HALVES
    }
    folder.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})
    is_stored_in_out = any(f"{name}.weight".endswith(naming.transposed) for name in layers)
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": 0.0,
            "use_rslora": settings.rank_stable,
            "bias": "none",
            "fan_in_fan_out": bool(naming.transposed) and is_stored_in_out,
            "inference_mode": True,
            "target_modules": sorted({name.rpartition(".")[2] for name in theirs.values()}),
        },
    )


def load_adapter(model: Decoder, folder: Path, *, quantize: bool = False) -> LoraSettings:
    """Give a model the adapters of a PEFT folder; returns their settings.

    Raises CheckpointError for a folder that is damaged, does not fit the model, or asks for more
    than plain LoRA.
    """
    config = read_json_object(folder / CONFIG)
    settings = _settings(folder, config, quantize=quantize)
    tensors = read_tensor_file(folder / WEIGHTS)
    naming = family_of_model(model).naming
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, half = name.removesuffix(".weight").rpartition(".")
        if not layer.startswith(_PREFIX) or half not in _HALVES:
            raise CheckpointError(f"{folder / WEIGHTS}: {name!r} is not part of a plain adapter.")
        ours = naming.from_checkpoint_name(layer.removeprefix(_PREFIX) + ".weight")
        found.setdefault(ours.removesuffix(".weight"), {})[half] = tensor
    known = {name for name, _ in model.named_modules()}
    if unknown := sorted(found.keys() - known):
        raise CheckpointError(f"{folder}: the model has no layer {unknown[0]!r}.")
    add_lora(model, _only(settings, tuple(found)))
    for name, layer in lora_layers(model):
        for half in _HALVES:
            parameter = layer.get_submodule(half).get_parameter("weight")
            tensor = found[name].get(half)
            if tensor is None or tensor.shape != parameter.shape:
                given = "nothing" if tensor is None else str(tuple(tensor.shape))
                raise CheckpointError(
                    f"{folder}: {half} of {name} is {given}, expected {tuple(parameter.shape)}."
                )
            parameter.data.copy_(tensor)
    return settings


def _only(settings: LoraSettings, names: tuple[str, ...]) -> LoraSettings:
    return LoraSettings(
        rank=settings.rank,
        alpha=settings.alpha,
        rank_stable=settings.rank_stable,
        quantize=settings.quantize,
        targets=names,
    )


def _settings(folder: Path, config: dict[str, Any], *, quantize: bool) -> LoraSettings:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{folder}: peft_type={config.get('peft_type')!r}; only LORA is read."
        )
    asked = [key for key in _UNSUPPORTED if config.get(key)]
    if config.get("bias", "none") != "none":
        asked.append("bias")
    if (start := config.get("init_lora_weights")) not in _KNOWN_STARTS:
        asked.append(f"init_lora_weights={start!r}")
    if asked:
        raise CheckpointError(f"{folder}: {', '.join(asked)} is not supported in an adapter.")
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        targets = (targets,)
    return LoraSettings(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rank_stable=bool(config.get("use_rslora")),
        targets=tuple(targets),
        quantize=quantize,
    )
