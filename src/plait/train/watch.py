"""What a run tells the outside, and what it asks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Watch:
    """Callbacks of a run.

    on_record gets every line of `metrics.jsonl`, on_stage a short text before something slow,
    on_progress(done, total) the tokens scored; should_stop is asked after each step.
    """

    on_record: Callable[[Record], None] = lambda record: None
    on_stage: Callable[[str], None] = lambda text: None
    on_progress: Callable[[int, int], None] = lambda done, total: None
    should_stop: Callable[[], bool] = lambda: False
