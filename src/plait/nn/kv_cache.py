"""Keys and values of the tokens seen so far, one pair of tensors a layer."""

# Shapes: B batch, T new tokens, S tokens held, K key-value heads, H size of a key, V of a value.

import torch
from torch import Tensor

from plait.errors import ModelError


class KVCache:
    """A contiguous cache of fixed capacity; `length` tokens of each row are filled."""

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        head_size: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        value_size: int | None = None,
    ) -> None:
        """Reserve memory for `capacity` tokens a row; values have the size of keys by default."""
        shape = (num_layers, batch_size, num_kv_heads, capacity)
        self._k_LBKSH = torch.zeros(*shape, head_size, dtype=dtype, device=device)
        self._v_LBKSV = torch.zeros(*shape, value_size or head_size, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row."""
        return self._k_LBKSH.shape[3]

    def append(self, layer: int, k_BKTH: Tensor, v_BKTV: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens of one layer; returns all its keys and values, (B, K, S, H or V).

        They go behind `length`, which itself moves in `advance`, once every layer has written.
        """
        end = self.length + k_BKTH.shape[2]
        if end > self.capacity:
            raise ModelError(
                f"{end} tokens do not fit into a cache of {self.capacity}. "
                "Make the cache larger, or generate fewer tokens."
            )
        k_BKSH, v_BKSV = self._k_LBKSH[layer], self._v_LBKSV[layer]
        k_BKSH[:, :, self.length : end] = k_BKTH
        v_BKSV[:, :, self.length : end] = v_BKTV
        return k_BKSH[:, :, :end], v_BKSV[:, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more as held."""
        self.length += num_tokens
