"""Keys and values of the tokens seen so far, one pair of tensors a layer."""

# Shapes: B batch, T new tokens, S tokens held, K key-value heads, H head size.

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
    ) -> None:
        """Reserve memory for `capacity` tokens a row."""
        shape = (num_layers, 2, batch_size, num_kv_heads, capacity, head_size)
        self._kv_L2BKSH = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit in a row."""
        return self._kv_L2BKSH.shape[4]

    def append(self, layer: int, k_BKTH: Tensor, v_BKTH: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens of one layer; returns all its keys and values, (B, K, S, H).

        They go behind `length`, which itself moves in `advance`, once every layer has written.
        """
        end = self.length + k_BKTH.shape[2]
        if end > self.capacity:
            raise ModelError(
                f"{end} tokens do not fit into a cache of {self.capacity}. "
                "Make the cache larger, or generate fewer tokens."
            )
        kv_2BKSH = self._kv_L2BKSH[layer]
        kv_2BKSH[0, :, :, self.length : end] = k_BKTH
        kv_2BKSH[1, :, :, self.length : end] = v_BKTH
        return kv_2BKSH[0, :, :, :end], kv_2BKSH[1, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` more as held."""
        self.length += num_tokens
