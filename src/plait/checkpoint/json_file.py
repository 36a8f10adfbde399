"""Small JSON files: read with a clear error, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from plait.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """Parse a file that holds one JSON object; CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return value


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it appears complete, in UTF-8."""
    temporary = path.with_name(f"{path.name}.incomplete")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file so that it appears complete."""
    write_text(path, json.dumps(value, indent=1) + "\n")
