"""A run at one step: the model in Hugging Face layout, and what training needs to go on.

Named leaves go to `training_state.safetensors`, plain facts (step, data cursor) to
`training_state.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from plait.checkpoint.commit import check_folder, commit_folder
from plait.checkpoint.huggingface import read_tensor_file, read_tensors, write_model
from plait.errors import CheckpointError
from plait.models.decoder import Decoder
from plait.models.registry import family_of_model

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
        write_model(model, folder)
        copy_tokenizer(tokenizer, folder)
        save_file(state.leaves, folder / _LEAVES)
        (folder / _FACTS).write_text(json.dumps(state.facts, indent=1) + "\n")

    commit_folder(target, write)


def load_training_state(folder: Path, model: Decoder) -> TrainingState:
    """Fill `model` and return the rest; raises CheckpointError if any byte has changed."""
    check_folder(folder)
    from_name = family_of_model(model).from_checkpoint_name
    model.load_state_dict(
        {from_name(name): leaf for name, leaf in read_tensors(folder).items()}, strict=False
    )
    return TrainingState(
        read_tensor_file(folder / _LEAVES), json.loads((folder / _FACTS).read_text())
    )


def export_model(target: Path, model: Decoder, tokenizer: Path) -> None:
    """Write a model folder that `transformers` loads, whole or not at all."""

    def write(folder: Path) -> None:
        write_model(model, folder)
        copy_tokenizer(tokenizer, folder)

    commit_folder(target, write)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer files of one folder into another."""
    names = [
        name for name in ("tokenizer.json", "tokenizer_config.json") if (source / name).is_file()
    ]
    if "tokenizer.json" not in names:
        raise CheckpointError(f"{source} has no tokenizer.json.")
    for name in names:
        (folder / name).write_bytes((source / name).read_bytes())
