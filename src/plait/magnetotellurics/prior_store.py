"""A learnt prior on disk: weights.safetensors, and prior.json with the prior it was made of."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from plait.errors import InversionError
from plait.magnetotellurics.prior_file import prior_from_table, prior_to_table
from plait.magnetotellurics.prior_network import (
    CodeGrid,
    ColumnNet,
    Learnt,
    PriorNetwork,
    Training,
)

_FORMAT = 1
_MAX_BYTES = 10_000_000


def save_network(network: PriorNetwork, folder: str | Path) -> None:
    """Write a network and its prior to a folder, which is made if it is absent."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.contiguous() for name, value in network.net.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    record = {
        "format": _FORMAT,
        "prior": prior_to_table(network.prior),
        "grid": {"z_m": network.grid.z_m.tolist(), "y_m": network.grid.y_m.tolist()},
        "training": dataclasses.asdict(network.training),
        "learnt": dataclasses.asdict(network.learnt),
    }
    (folder / "prior.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def load_network(folder: str | Path) -> PriorNetwork:
    """Read what save_network wrote; the network answers bit for bit as before.

    Raises:
        InversionError: an absent or damaged file, another format, weights of other sizes.
    """
    folder = Path(folder)
    record = _read_record(folder / "prior.json")
    try:
        grid = CodeGrid(
            z_m=np.array(record["grid"]["z_m"], dtype=float),
            y_m=np.array(record["grid"]["y_m"], dtype=float),
        )
        training = Training(**record["training"])
        learnt = Learnt(
            **{**record["learnt"], "rmse_of_depth": tuple(record["learnt"]["rmse_of_depth"])}
        )
        prior = prior_from_table(record["prior"])
    except (KeyError, TypeError, ValueError) as error:
        raise InversionError(f"{folder / 'prior.json'}: not a learnt prior: {error!r}") from error
    net = ColumnNet(grid.num_cells, training).double().eval().requires_grad_(False)
    path = folder / "weights.safetensors"
    try:
        net.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise InversionError(f"{path}: cannot be read as this prior's weights: {error}") from error
    if not all(bool(torch.isfinite(value).all()) for value in net.state_dict().values()):
        raise InversionError(f"{path}: holds values that are not finite")
    return PriorNetwork(prior=prior, grid=grid, training=training, learnt=learnt, net=net)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InversionError(f"{path}: over {_MAX_BYTES} bytes is not a learnt prior")
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InversionError(f"{path}: cannot be read as a learnt prior: {error}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise InversionError(f"{path}: not a learnt prior of format {_FORMAT}")
    return record
