"""On what a run was made: everything but its settings and data that its numbers depend on."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from plait.backend.store import own_sources

_PACKAGES = ("plait", "torch", "numpy", "tokenizers", "safetensors")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, hardware and threads, and the command line with the folder it was given in."""
    return {
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "plait_sources_sha256": own_sources(),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "processor": _processor(),
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
