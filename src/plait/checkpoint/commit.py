"""Write a folder so that it appears whole or not at all.

The files go to a temporary sibling, are synced to the disk, listed with size and hash in
`manifest.json`, and only then renamed to their final name. A full disk, a crash or a kill leaves
the previous folder as it was.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from plait.checkpoint.json_file import read_json_object, write_json
from plait.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT = 1
_TEMPORARY = ".incomplete-"


def commit_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Call `write(folder)` on an empty folder, then move that folder to `target`.

    What was there is replaced. Raises CheckpointError if the disk refuses; `target` is then
    untouched.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        restore_folder(target)
        for leftover in target.parent.glob(f"{_TEMPORARY}{target.name}-*"):
            shutil.rmtree(leftover)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{target.name}-", dir=target.parent))
    except OSError as error:
        raise _refused(target, error) from error
    try:
        write(temporary)
        _write_manifest(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        temporary.chmod(0o755)
        _replace(temporary, target)
        _sync(target.parent)
    except BaseException as error:  # Ctrl-C too must not leave half a folder
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise _refused(target, error) from error
        raise


def restore_folder(target: Path) -> None:
    """Put back a folder that a kill caught between the two renames of its replacement."""
    old = _aside(target)
    if old.exists() and not target.exists():
        old.rename(target)


def check_folder(folder: Path) -> None:
    """Compare every file with the manifest; raises CheckpointError naming one that differs."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it is not a checkpoint written by plait."
        )
    entries = read_json_object(manifest).get("files")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{manifest} lists no files. Use an earlier checkpoint.")
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing. Use an earlier checkpoint.")
        if (num_bytes := path.stat().st_size) != entry["bytes"]:
            raise CheckpointError(
                f"{path} has {num_bytes} bytes, {entry['bytes']} were saved: it was cut short or "
                "changed. Use an earlier checkpoint."
            )
        if _hash(path) != entry["sha256"]:
            raise CheckpointError(
                f"{path} does not hold the bytes that were saved. Use an earlier checkpoint."
            )


def _write_manifest(folder: Path) -> None:
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"format": _FORMAT, "files": files})


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(temporary: Path, target: Path) -> None:
    if not target.exists():
        temporary.rename(target)
        return
    # A folder cannot be renamed over another: the old one steps aside, and back if the second
    # rename fails.
    old = _aside(target)
    target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f"{_TEMPORARY}{target.name}-old")


def _refused(target: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"{target} could not be saved: {error}. What was there before is untouched. "
        "Free some space, or choose another folder with --out."
    )
