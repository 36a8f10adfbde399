"""A run at one step: the model in Hugging Face layout, and what training needs to go on.

Named leaves go to `training_state.safetensors`, plain facts (step, data cursor) to
`training_state.json`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from plait.checkpoint.commit import check_folder, commit_folder
from plait.checkpoint.huggingface import (
    end_tokens,
    read_leaves,
    read_tensor_file,
    write_model,
)
from plait.checkpoint.json_file import read_json_object, write_json
from plait.models.decoder import Decoder

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_LEAVES = "training_state.safetensors"
_FACTS = "training_state.json"


@dataclass(frozen=True)
class TrainingState:
    """leaves: tensors by name (optimizer moments, random streams). facts: JSON values."""

    leaves: dict[str, Tensor]
    facts: dict[str, Any]


def save_training_state(
    target: Path, model: Decoder, state: TrainingState, tokenizer: Path
) -> None:
    """Write a checkpoint folder, whole or not at all, with the files of the tokenizer folder."""

    def write(folder: Path) -> None:
        _write_model_with_tokenizer(model, folder, tokenizer)
        save_file(state.leaves, folder / _LEAVES)
        write_json(folder / _FACTS, state.facts)

    commit_folder(target, write)


def load_training_state(folder: Path, model: Decoder) -> TrainingState:
    """Fill `model` and return the rest; raises CheckpointError if any byte has changed."""
    check_folder(folder)
    model.load_state_dict(read_leaves(folder, model), strict=False)
    return TrainingState(read_tensor_file(folder / _LEAVES), read_json_object(folder / _FACTS))


def save_leaves(target: Path, state: TrainingState) -> None:
    """Write named leaves and facts alone, whole or not at all."""

    def write(folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in state.leaves.items()}, folder / _LEAVES)
        write_json(folder / _FACTS, state.facts)

    commit_folder(target, write)


def load_leaves(folder: Path) -> TrainingState:
    """Read what `save_leaves` wrote; raises CheckpointError if any byte has changed."""
    check_folder(folder)
    return TrainingState(read_tensor_file(folder / _LEAVES), read_json_object(folder / _FACTS))


def export_model(target: Path, model: Decoder, tokenizer: Path) -> None:
    """Write a model folder that `transformers` loads, whole or not at all."""

    def write(folder: Path) -> None:
        _write_model_with_tokenizer(model, folder, tokenizer)

    commit_folder(target, write)


def _write_model_with_tokenizer(model: Decoder, folder: Path, tokenizer: Path) -> None:
    """Write both; `config.json` then names the token that ends a text, as transformers expects."""
    names = [name for name in _TOKENIZER_FILES if (tokenizer / name).is_file()]
    for name in names:
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    ends = end_tokens(tokenizer)
    numbers = {"bos_token_id": ends[0], "eos_token_id": ends[0]} if ends else {}
    write_model(model, folder, more_settings=numbers)
