"""Where the tokens of a batch belong: the second argument of every model."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """What a model must know about its tokens beyond their order; None means the plain case.

    positions: (B, T) int64, the place of each token in its document. Plain: counted from the start
    of the row, or from the end of the cache. segments: (B, T) int64, the document each token
    belongs to; tokens attend within theirs only. Plain: one document a row. Not together with a
    cache.
    """

    positions: Tensor | None = None
    segments: Tensor | None = None
