"""Models in the layout of Hugging Face: `config.json`, `model.safetensors`, tokenizer files.

Reads single and sharded weight files; writes what `AutoModelForCausalLM.from_pretrained` loads.
Tensors keep their dtype and every byte in both directions.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from plait.checkpoint.json_file import read_json_object, write_json
from plait.errors import CheckpointError
from plait.models.decoder import Decoder, DecoderConfig
from plait.models.registry import family_of_config, family_of_model
from plait.nn.lora import lora_layers
from plait.ops.numerics import Numerics

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DERIVED = ".rotary_emb.inv_freq"  # a table that old Llama checkpoints carry along


def load_model(
    folder: str | Path, *, dtype: torch.dtype | None = None, numerics: Numerics = "fast"
) -> Decoder:
    """Build the model that `config.json` names and fill it from the weights beside it.

    dtype: of the parameters; default that of the file. numerics: how the model computes. Raises
    CheckpointError for missing, damaged or unmatched files, ModelError for a config that no family
    takes.
    """
    folder = Path(folder)
    with torch.device("meta"):
        model = Decoder(replace(load_config(folder), numerics=numerics))
    leaves = read_leaves(folder, model)
    # Strict kernels want aligned weights; those of a safetensors file lie anywhere.
    copy = numerics == "strict"
    cast = {name: leaf.to(dtype or leaf.dtype, copy=copy) for name, leaf in leaves.items()}
    model.load_state_dict(cast, strict=False, assign=True)
    model.tie()
    return model.eval()


def load_config(folder: Path) -> DecoderConfig:
    """Read the shape of the model that `config.json` names; raises as `load_model` does."""
    settings = _read_config(folder)
    return family_of_config(settings).read_config(settings)


def write_model(
    model: Decoder, folder: Path, *, more_settings: Mapping[str, Any] | None = None
) -> None:
    """Write `config.json`, with more settings if given, and `model.safetensors` into a folder."""
    family = family_of_model(model)
    if any(lora_layers(model)):
        raise CheckpointError("the model has adapters. Merge them first, or write them alone.")
    leaves = checkpoint_leaves(model)
    settings = family.write_config(model.config) | dict(more_settings or {})
    settings["dtype"] = str(next(iter(leaves.values())).dtype).removeprefix("torch.")
    write_json(folder / CONFIG, settings)
    laid_out = family.naming.to_checkpoint({k: leaf.detach() for k, leaf in leaves.items()})
    tensors = {name: tensor.contiguous() for name, tensor in laid_out.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read `tokenizer.json` in a folder; raises CheckpointError if it is missing or damaged."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    # Some files carry the settings of a past training run; text must never be cut in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def end_tokens(folder: Path) -> list[int]:
    """Tokens that end a text, as the tokenizer and config files of a model folder say, in order."""
    found: list[int] = []
    tokenizer = load_tokenizer(folder)
    token = read_if_there(folder / "tokenizer_config.json").get("eos_token")
    text = token["content"] if isinstance(token, dict) else token
    if text is not None and (number := tokenizer.token_to_id(text)) is not None:
        found.append(number)
    for file in ("generation_config.json", CONFIG):
        numbers = read_if_there(folder / file).get("eos_token_id")
        found += numbers if isinstance(numbers, list) else [] if numbers is None else [numbers]
    return list(dict.fromkeys(found))


def read_if_there(path: Path) -> dict[str, Any]:
    """Parse a JSON object, or return an empty one if there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} has no {CONFIG}. "
            "Name a folder in the layout of Hugging Face, or a run folder."
        )
    return read_json_object(folder / CONFIG)


def read_leaves(folder: Path, model: Decoder) -> dict[str, Tensor]:
    """Read the tensors of a folder under our names; raises CheckpointError if they do not fit."""
    family = family_of_model(model)
    tensors = {k: v for k, v in read_tensors(folder).items() if not k.endswith(_DERIVED)}
    leaves = _leave_out_further_layers(folder, family.naming.from_checkpoint(tensors), model)
    expected = checkpoint_leaves(model)
    _match(folder, found=leaves, expected=expected)
    return {name: leaves[name] for name in expected}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read every tensor of the weight files in a folder, under the names of the files."""
    leaves: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        leaves.update(read_tensor_file(path))
    return leaves


def read_tensor_file(path: Path) -> dict[str, Tensor]:
    """Read one safetensors file. Raises CheckpointError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no __iter__)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}. Fetch or save it again."
        ) from error


def checkpoint_leaves(model: Decoder) -> dict[str, Tensor]:
    """Parameters and buffers by name, a shared one once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _leave_out_further_layers(
    folder: Path, leaves: dict[str, Tensor], model: Decoder
) -> dict[str, Tensor]:
    """Drop the layers behind the last, with which DeepSeek-V3 predicts further tokens ahead."""
    if model.config.family != "deepseek_v3":
        return leaves
    own = tuple(f"layers.{number}." for number in range(model.config.num_layers))
    further = [name for name in leaves if name.startswith("layers.") and not name.startswith(own)]
    if further:
        warnings.warn(
            f"{folder}: {len(further)} tensors of layers that predict further tokens are left out",
            stacklevel=3,
        )
    return {name: leaf for name, leaf in leaves.items() if name not in further}


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / _INDEX
    if not index.is_file():
        raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {_INDEX}.")
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{index} has no weight_map.")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{index} names {name!r}, which is not a file in {folder}.")
    return [folder / name for name in names]


def _match(folder: Path, *, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing, surplus = (
        sorted(expected.keys() - found.keys()),
        sorted(found.keys() - expected.keys()),
    )
    # Tied models are sometimes saved with the shared matrix under both names.
    surplus = [name for name in surplus if name != "lm_head.weight"]
    if missing or surplus:
        raise CheckpointError(
            f"the weights in {folder} do not fit its {CONFIG}: "
            f"{len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(surplus)} unknown ({', '.join(surplus[:3])})."
        )
    for name, parameter in expected.items():
        if found[name].shape != parameter.shape:
            raise CheckpointError(
                f"{name} in {folder} has shape {tuple(found[name].shape)}, "
                f"its {CONFIG} asks for {tuple(parameter.shape)}."
            )
