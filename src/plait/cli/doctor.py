"""`plait doctor`: what this machine has, which kernels will run on it, what could be added."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Annotated

import torch
import typer

from plait.cli.output import show, show_json, show_table
from plait.ops.attention import blocked_kernel_pays

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
# Name of the extra -> (package that tells whether it is there, what it adds).
_EXTRAS: Mapping[str, tuple[str, str]] = {
    "magnetotellurics": ("scipy", "magnetotelluric modelling, inversion and their pictures"),
    "test": ("pytest", "the tests, and transformers to compare with"),
    "check": ("ruff", "the style, type and layer checks of `make check`"),
}


def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what this machine has, which kernels will be chosen on it, and what extras would add.

    Example: plait doctor
    """
    sections = {"machine": _machine(), "kernels": _kernels(), "extras": _extras()}
    if as_json:
        show_json(sections)
        return
    for title, rows in sections.items():
        show(title)
        show_table([(f"  {name}", value) for name, value in rows.items()])


def _machine() -> dict[str, str]:
    flags = _cpu_flags()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return {
        "cpu": _cpu_name(),
        "cores": f"{len(os.sched_getaffinity(0))} usable, {torch.get_num_threads()} threads",
        **{name: "yes" if name in flags else "no" for name in _CPU_FLAGS},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        "torch": f"{torch.__version__} ({build})",
    }


def _kernels() -> dict[str, str]:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        products = "cuBLAS, bfloat16"
    elif torch.cpu._is_amx_tile_supported():
        products = "oneDNN, bfloat16 with AMX tiles"
    elif torch.cpu._is_avx512_bf16_supported():
        products = "oneDNN, bfloat16 with AVX-512 dot products"
    else:
        products = "oneDNN, float32 (bfloat16 is emulated here, many times slower)"
    if on_gpu:
        attention = "PyTorch's scaled_dot_product_attention"
    else:
        attention = "plait's blocked kernel" if blocked_kernel_pays() else "PyTorch's flash kernel"
    return {
        "matrix products": products,
        "causal attention, bfloat16": attention,
        "causal attention, float32": "PyTorch's scaled_dot_product_attention",
        "loss": "plait's fused linear cross-entropy, chunked",
        "optimizer": "PyTorch's fused AdamW",
    }


def _extras() -> dict[str, str]:
    return {name: f"{_version(package)}: {adds}" for name, (package, adds) in _EXTRAS.items()}


def _version(package: str) -> str:
    try:
        return f"installed ({package} {importlib.metadata.version(package)})"
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpu_line("flags").split())


def _cpu_name() -> str:
    return _cpu_line("model name") or platform.machine()


def _cpu_line(name: str) -> str:
    """Value of a line of /proc/cpuinfo, or nothing where there is no such file."""
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith(name)), ""
            )
    except FileNotFoundError:
        return ""
