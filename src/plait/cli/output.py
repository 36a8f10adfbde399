"""Printing: results to stdout, everything else to stderr."""

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console


def progress_console() -> Console:
    """Console for progress, on stderr."""
    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print one line to stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def show(text: str = "", *, end: str = "\n") -> None:
    """Print to stdout."""
    print(text, end=end, flush=True)  # noqa: T201


def show_json(value: Any) -> None:
    """Print one JSON value to stdout."""
    show(json.dumps(value, indent=2))


def show_table(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two aligned columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        show(f"{name:<{width}}  {value}")


def duration(seconds: float) -> str:
    """Seconds as 41 s, 5:03 or 2:05:10."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
