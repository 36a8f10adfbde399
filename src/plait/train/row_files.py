"""Which files some data or a model consist of, with a hash of every byte."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from plait.train.rows import row_files

_MODEL_SUFFIXES = (".safetensors", ".json", ".jinja")


def file_hashes(data: str) -> dict[str, str]:
    """SHA-256 of each file of rows by name; the Arrow files of a saved dataset too."""
    path = Path(data)
    if path.is_dir():
        return _hashes(row_files(path) or sorted(path.glob("*.arrow")))
    return _hashes(row_files(path))


def model_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a model or adapter folder by name."""
    return _hashes(path for path in sorted(folder.iterdir()) if path.suffix in _MODEL_SUFFIXES)


def _hashes(paths: Iterable[Path]) -> dict[str, str]:
    return {str(path): _sha256(path) for path in paths}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
