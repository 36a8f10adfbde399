"""The records of a run: a line each in `metrics.jsonl`, TensorBoard's events, and the watch."""

import json
from types import TracebackType

from plait.checkpoint.json_file import write_text
from plait.train.run_folder import RunFolder
from plait.train.tensorboard import TensorBoardWriter
from plait.train.watch import Record, Watch


class Records:
    """Takes the records of a run from a step on; a context manager, which closes the files."""

    def __init__(self, run: RunFolder, watch: Watch, *, after: int, tensorboard: bool) -> None:
        """Forget the records behind step `after`. MissingExtraError if TensorBoard is not there."""
        self._watch = watch
        self._events = TensorBoardWriter(run.events, after=after) if tensorboard else None
        kept = [record for record in run.read_metrics() if record["step"] <= after]
        write_text(run.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = run.metrics.open("a", encoding="utf-8")

    def __enter__(self) -> "Records":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def add(self, record: Record) -> None:
        """Write one record at once, and tell it."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.write(record)
        self._watch.on_record(record)
