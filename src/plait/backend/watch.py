"""What TorchDynamo notes while it compiles: graph breaks, and one record for each frame."""

# pyright: basic
# (TorchDynamo is not typed.)

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch._dynamo import utils

_LIMIT = 10_000  # frames that a script may compile and still be explained


class Watch:
    """Breaks and frames since it was made."""

    def __init__(self) -> None:
        self._num_breaks = len(utils.graph_break_reasons)
        self._start_us = time.time_ns() // 1000

    def breaks(self) -> Sequence:
        """Graph breaks: each has a `reason` and a `user_stack`."""
        return utils.graph_break_reasons[self._num_breaks :]

    def frames(self) -> list:
        """Compiled frames, and frames that were given up: torch's `CompilationMetrics`."""
        found = []
        for frame in reversed(utils.get_compilation_metrics()):
            if (frame.start_time_us or 0) < self._start_us:
                break
            found.append(frame)
        return found[::-1]

    def saw_anything(self) -> bool:
        """Whether anything was compiled, or tried, meanwhile; cheap enough for every call."""
        if len(utils.graph_break_reasons) > self._num_breaks:
            return True
        frames = utils._compilation_metrics
        return bool(frames) and (frames[-1].start_time_us or 0) >= self._start_us


@contextmanager
def remembering_frames() -> Iterator[Watch]:
    """Keep the records of many frames; torch keeps 64."""
    before = utils._compilation_metrics.maxlen or utils.DEFAULT_COMPILATION_METRICS_LIMIT
    utils.set_compilation_metrics_limit(max(before, _LIMIT))
    try:
        yield Watch()
    finally:
        utils.set_compilation_metrics_limit(before)
