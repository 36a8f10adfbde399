"""What every benchmark prints: claims with target and figure, hardware, versions, commit."""

import argparse
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from plait.cost.accelerators import cluster_of_gpu

ROOT = Path(__file__).parents[1]
_RESULTS = "benchmarks/results"
_UNITS = "ONEDNN_MAX_CPU_ISA"  # by which oneDNN is told to do without the newest units


@dataclass(frozen=True, kw_only=True)
class Row:
    """One claim. value is the median of samples; a row that was left out is marked full_only."""

    claim: str
    unit: str
    target: float | None
    better: Literal["higher", "lower"]
    samples: list[float] = field(default_factory=list)
    full_only: bool = False

    @property
    def value(self) -> float | None:
        """Median of the samples."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def holds(self) -> bool | None:
        """Whether the target is met; None where there is no target or no sample."""
        if self.value is None or self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


def run_benchmark(name: str, measure: Callable[[bool], list[Row]]) -> None:
    """Parse --json and --quick, call `measure(quick)`, print, and keep a full result."""
    _finish(name, measure, _parser(name).parse_args())


def run_levels(
    name: str, measures: Mapping[str, Callable[[bool], list[Row]]], option: str = "level"
) -> None:
    """Do the same for one of several levels, by --level; the first needs no saying.

    option: what levels are called here.
    """
    parser, first = _parser(name), next(iter(measures))
    parser.add_argument(
        f"--{option}", choices=list(measures), default=first, help="what is compared"
    )
    arguments = parser.parse_args()
    level = getattr(arguments, option)
    result = name if level == first else f"{name}_{level.lower()}"
    _finish(result, measures[level], arguments)


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument("--quick", action="store_true", help="under a minute; leaves rows out")
    return parser


def _finish(name: str, measure: Callable[[bool], list[Row]], arguments: argparse.Namespace) -> None:
    rows = measure(arguments.quick)
    result = {
        "benchmark": name,
        "hardware": hardware(),
        "versions": versions(),
        "commit": commit(),
        "rows": [asdict(row) | {"value": row.value, "holds": row.holds} for row in rows],
    }
    if not arguments.json:
        print_table(name, rows)
    if not arguments.quick:
        path = ROOT / _RESULTS / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(result))


def print_table(name: str, rows: Sequence[Row]) -> None:
    """Print the rows for people, with the spread of their samples."""
    print(f"{name} on {hardware()}")
    for row in rows:
        if row.value is None:
            print(f"  {row.claim}: left out (needs the full run)")
            continue
        verdict = {True: "holds", False: "MISSED", None: "no target"}[row.holds]
        sign = ">=" if row.better == "higher" else "<="
        target = "" if row.target is None else f", target {sign} {row.target:g}"
        spread = (
            f" [{min(row.samples):.4g} .. {max(row.samples):.4g}]" if len(row.samples) > 1 else ""
        )
        print(f"  {row.claim}: {row.value:.4g} {row.unit}{spread}{target}: {verdict}")


def device() -> str:
    """Where benchmarks run that have no device of their own: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def cluster_of_this_gpu(name: str) -> str:
    """The cluster that has GPUs like the one here. name: of the benchmark, which ends without one.

    Raises PlanError for a GPU that no cluster has.
    """
    if device() != "cuda":
        raise SystemExit(
            f"{name} --device cuda: PyTorch sees no GPU here, so nothing was measured. "
            "Run it where there is one, or leave --device out."
        )
    return cluster_of_gpu(torch.cuda.get_device_name())


def make_on_device() -> None:
    """Make tensors there from now on."""
    if device() == "cuda":
        torch.set_default_device("cuda")


def finish() -> None:
    """Wait for what a GPU was given to do, so that a clock may be read."""
    if device() == "cuda":
        torch.cuda.synchronize()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within, parameters are made in this dtype: fake ones cannot be cast in place."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def hardware() -> str:
    """Name the processor, its cores and the GPU."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = f"{lines[0].split(':', 1)[1].strip()} x {len(lines)}" if lines else cpu
    flags = [
        name
        for name, present in (
            ("AVX512_BF16", torch.cpu._is_avx512_bf16_supported()),
            ("AMX", torch.cpu._is_amx_tile_supported()),
        )
        if present
    ]
    if limit := os.environ.get(_UNITS):
        flags.append(f"oneDNN up to {limit}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu} ({', '.join(flags) or 'no bfloat16 units'}), {gpu}"


def versions() -> dict[str, str]:
    """Versions of what decides the figures."""
    packages = [name for name in ("torch", "transformers", "tokenizers") if find_spec(name)]
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def commit() -> str:
    """Commit of the working tree, with a mark if anything but results has changed."""
    name = _git("describe", "--always", "--abbrev=12")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{_RESULTS}")
    return f"{name}-dirty" if changed else name


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
