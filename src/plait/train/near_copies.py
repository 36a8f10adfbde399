"""Find files that share so many lines that they must stay on one side of a split."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from plait.train.text_file import Lines

_COMMON_LINE_FILES = 1000
"""A line in more files than this says nothing about copies; leaving it out bounds the work."""


def group_near_copies(line_sets: Sequence[Lines]) -> list[int]:
    """Number the groups of files that must stay together.

    Two files are tied if they share over half of the distinct lines of both, or over half of the
    telling (long) lines of one: a file copied into a larger one. Short lines alone would tie most
    programs.
    """
    leader = list(range(len(line_sets)))
    everything = [lines.hashes for lines in line_sets]
    telling = [lines.hashes[lines.num_short :] for lines in line_sets]
    for sets, of_both in ((everything, True), (telling, False)):
        sizes = np.array([len(hashes) for hashes in sets])
        for file, shared in enumerate(_shared_lines(sets)):
            half_of = np.maximum(sizes, sizes[file]) if of_both else sizes[file]
            for other in np.flatnonzero(2 * shared > half_of):
                _join(leader, file, int(other))
    return [_find(leader, file) for file in range(len(line_sets))]


def _shared_lines(sets: list[NDArray[np.uint64]]) -> Iterator[NDArray[np.int64]]:
    """For each set in turn, how many of its lines each set has, itself left out."""
    lines = np.concatenate(sets)
    owners = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    order = np.argsort(lines, kind="stable")
    lines, owners = lines[order], owners[order]
    starts = (
        np.flatnonzero(np.concatenate(([True], lines[1:] != lines[:-1])))
        if len(lines)
        else lines[:0]
    )
    ends = np.append(starts[1:], len(lines)).astype(np.int64)
    place_of = np.searchsorted(lines[starts], np.concatenate(sets))
    before = 0
    for file, hashes in enumerate(sets):
        places = place_of[before : before + len(hashes)]
        before += len(hashes)
        num_files = ends[places] - starts[places]
        places = places[(num_files > 1) & (num_files <= _COMMON_LINE_FILES)]
        holders = [owners[starts[i] : ends[i]] for i in places]
        shared = np.bincount(
            np.concatenate(holders) if holders else owners[:0], minlength=len(sets)
        )
        shared[file] = 0
        yield shared


def _find(leader: list[int], file: int) -> int:
    while leader[file] != file:
        leader[file] = leader[leader[file]]
        file = leader[file]
    return file


def _join(leader: list[int], first: int, second: int) -> None:
    a, b = _find(leader, first), _find(leader, second)
    leader[max(a, b)] = min(a, b)
