"""Which files some data consist of, with a hash of every byte."""

import hashlib
from pathlib import Path

from plait.train.rows import row_files

_BLOCK_BYTES = 1 << 20


def file_hashes(data: str) -> dict[str, str]:
    """SHA-256 of each file by name; the Arrow files of a saved dataset too."""
    path = Path(data)
    files = [path]
    if path.is_dir():
        files = row_files(path) or sorted(path.glob("*.arrow"))
    return {str(file): _sha256(file) for file in files}


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()
