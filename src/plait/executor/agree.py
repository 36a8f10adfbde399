"""Ranks that run one schedule compare it before its first step: one that differs would hang all.

They compare through the store of the default process group, never by a collective, which would hang
itself. What differs is shown on every rank, and every rank stops.
"""

# pyright: basic
# (groups and stores are not typed.)

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.distributed_c10d import _get_default_store

from plait.errors import PlanError
from plait.executor.codegen import GroupAtRun
from plait.executor.ranks import local_part, replicated_on
from plait.graph.schedule import Program, Schedule

TIME_LIMIT_S = 120.0
_ALONE = ("fake", "delayed")
"""Backends in which one process stands for all ranks."""
_NUM_SHOWN = 6
_counts: Counter[str] = Counter()


def check_agreement(
    schedule: Schedule,
    parameters: Mapping[str, Tensor],
    groups: Mapping[str, GroupAtRun],
    *,
    time_limit_s: float = TIME_LIMIT_S,
) -> None:
    """Compare the schedule, and parameters that ranks hold alike, with the ranks of each axis.

    Raises PlanError on every rank if anything differs, or if a rank does not come in time.
    """
    if not groups or not dist.is_initialized() or dist.get_backend() in _ALONE:
        return
    ranks_of = {
        axis: dist.get_process_group_ranks(_group(group.name)) for axis, group in groups.items()
    }
    ranks_of = {axis: ranks for axis, ranks in ranks_of.items() if len(ranks) > 1}
    mine = _of_schedule(schedule)
    found = {
        axis: _said(axis, ranks, mine | _of_parameters(parameters, axis), time_limit_s)
        for axis, ranks in ranks_of.items()
    }
    differences = (_difference(axis, ranks, found[axis]) for axis, ranks in ranks_of.items())
    own = known = next(filter(None, differences), "")
    # Axis by axis each rank tells what it knows: in the end all ranks of the mesh do.
    for axis, ranks in ranks_of.items():
        told = _said(axis, ranks, {"difference": known}, time_limit_s)
        known = known or next((x["difference"] for x in told if x["difference"]), "")
    if known:
        raise PlanError(own or f"other ranks of this schedule stop: {known}")


def _group(name: Any) -> Any:
    return _resolve_process_group(name)


def _said(
    axis: str, ranks: list[int], mine: dict[str, str], time_limit_s: float
) -> list[dict[str, str]]:
    """Say something to the ranks of an axis, and hear what each of them says."""
    place = f"plait/agree/{'-'.join(map(str, ranks))}"
    _counts[place] += 1
    store, keys = _get_default_store(), [f"{place}/{_counts[place]}/{rank}" for rank in ranks]
    store.set(keys[ranks.index(dist.get_rank())], json.dumps(mine))
    try:
        store.wait(keys, timedelta(seconds=time_limit_s))
    except RuntimeError as error:  # DistStoreError, whose kinds differ between releases
        missing = [rank for rank, key in zip(ranks, keys, strict=True) if not store.check([key])]
        raise PlanError(
            f"ranks {missing} of the axis {axis!r} did not begin this schedule within "
            f"{time_limit_s:g} s. Look at what they raised; all ranks must run the same schedules."
        ) from error
    return [json.loads(store.get(key)) for key in keys]


def _difference(axis: str, ranks: list[int], found: list[dict[str, str]]) -> str:
    """In what the ranks of an axis differ, as text; empty if in nothing."""
    different = [name for name in _names(found) if len({x.get(name) for x in found}) > 1]
    if not different:
        return ""
    lines = [_line(name, ranks, found) for name in different[:_NUM_SHOWN]]
    more = len(different) - len(lines)
    return (
        f"the ranks of the axis {axis!r} disagree:\n"
        + "\n".join(lines)
        + (f"\nand {more} more" if more > 0 else "")
        + "\nCapture and compile with the same plan, inputs and software on every rank, and "
        "give each the same weights and the same seed."
    )


def _names(found: Iterable[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(name for each in found for name in each))


def _line(name: str, ranks: list[int], found: list[dict[str, str]]) -> str:
    values = (f"rank {rank}: {x.get(name, 'none')}" for rank, x in zip(ranks, found, strict=True))
    return f"  {name}: {', '.join(values)}"


def _of_schedule(schedule: Schedule) -> dict[str, str]:
    """What ranks compare, what says most first. Notes and source lines may differ."""
    split = sorted({note.text for note in schedule.notes if note.text.startswith("split in")})
    found = {
        "replicas": "; ".join(split) or "1",
        "numerics": schedule.numerics,
        "level": schedule.level,
        "micro-batches": str(schedule.num_micro_batches),
        "groups": str(dict(sorted(schedule.groups.items()))),
        "inputs": _digest(repr(schedule.inputs)),
    }
    for program in (*schedule.programs.values(), *schedule.templates.values()):
        found[f"program {program.name}"] = _digest(_text(program))
    for name, x in schedule.constants.items():
        found[f"constant {name}"] = _checksum(x)
    return found


def _text(program: Program) -> str:
    steps = [(step.name, step.target, step.args, step.kwargs) for step in program.steps]
    return repr((program.inputs, program.results, steps))


def _of_parameters(parameters: Mapping[str, Tensor], axis: str) -> dict[str, str]:
    """Checksums of what this rank holds of the parameters that are alike along the axis."""
    return {
        f"parameter {name}": _checksum(local_part(parameter))
        for name, parameter in parameters.items()
        if axis in ("dp", *replicated_on(parameter))
    }


def _checksum(x: Tensor) -> str:
    data: Any = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data):08x}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
