"""Files of an inversion run: its settings, and the state from which it resumes."""

import json
import zipfile
from dataclasses import astuple
from pathlib import Path

import numpy as np

from plait.config import Json
from plait.errors import InversionError
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.inversion import Checkpoint, StepRecord


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def open_run(folder: Path, settings: Json) -> bool:
    """Make a run folder, or check that it holds a run of the same settings.

    Returns:
        Whether the folder held such a run, which is then to be continued.

    Raises:
        InversionError: the folder holds another run.
    """
    path = folder / "resolved.json"
    text = json.dumps(settings, indent=2) + "\n"
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise InversionError(
                f"{folder} holds a run with other settings; name another folder with --out"
            )
        return True
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return False


def save_state(path: Path, state: Checkpoint) -> None:
    """Write a checkpoint; a run that is cut while writing keeps the one before."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        np.savez(
            stream,
            parameters=state.parameters,
            trade_off=np.array(state.trade_off),
            history=np.array([astuple(record) for record in state.history]),
        )
    part.replace(path)


def load_state(path: Path) -> Checkpoint | None:
    """Read a checkpoint, or give None where there is none.

    Raises:
        InversionError: a damaged file.
    """
    if not path.is_file():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            history = tuple(_record(row) for row in arrays["history"])
            return Checkpoint(
                parameters=arrays["parameters"],
                trade_off=float(arrays["trade_off"]),
                history=history,
            )
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise InversionError(f"{path}: cannot be read as the state of a run: {error}") from error


def _record(row: RealArray) -> StepRecord:
    step, rms, roughness, trade_off, num_forward, duration_s = row.tolist()
    return StepRecord(
        step=int(step),
        rms=rms,
        roughness=roughness,
        trade_off=trade_off,
        num_forward=int(num_forward),
        duration_s=duration_s,
    )
