"""What xz makes of the held-out text: the yardstick beside a model's bits per byte."""

import lzma
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from plait.train.corpus import Document, num_bytes

_LEVEL = 9 | lzma.PRESET_EXTREME
_WINDOW_BYTES = 64 << 20  # of level 9; beyond it nothing is matched


@dataclass(frozen=True)
class XzBaseline:
    """Bits per byte of the held-out text under `xz -9e`.

    solid: all files as one stream, the target to beat. per_file: each alone. conditional: what they
    add to a stream that begins with the training text; None without such text, or if both together
    are longer than xz's window of 64 MiB.
    """

    solid: float
    per_file: float
    conditional: float | None


def compress_with_xz(train: Sequence[Document], heldout: Sequence[Document]) -> XzBaseline:
    """Compress in all ways of `XzBaseline`, two at a time; needs about 1.5 GB of memory."""
    heldout_bytes = [document.read_bytes() for document in heldout]
    solid = b"".join(heldout_bytes)
    bits = 8 / len(solid)
    with ThreadPoolExecutor(2) as pool:
        before = after = None
        if train and num_bytes(train) + len(solid) <= _WINDOW_BYTES:
            train_bytes = b"".join(document.read_bytes() for document in train)
            after = pool.submit(_num_compressed, train_bytes + solid)
            before = pool.submit(_num_compressed, train_bytes)
        one_stream = pool.submit(_num_compressed, solid)
        each = pool.map(_num_compressed, heldout_bytes)
        return XzBaseline(
            solid=bits * one_stream.result(),
            per_file=bits * sum(each),
            conditional=bits * (after.result() - before.result()) if before and after else None,
        )


def _num_compressed(content: bytes) -> int:
    return len(lzma.compress(content, preset=_LEVEL))
