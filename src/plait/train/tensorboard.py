"""Records of a run as TensorBoard's event files, where TensorBoard is installed."""

from pathlib import Path
from typing import Any

from plait.errors import MissingExtraError


class TensorBoardWriter:
    """Writes every number of every record, by step."""

    def __init__(self, folder: Path, *, after: int) -> None:
        """Open a folder; events behind step `after` are hidden. MissingExtraError without it."""
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "tensorboard=true needs TensorBoard: pip install tensorboard."
            ) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=after + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Add one record."""
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)):
                self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()
