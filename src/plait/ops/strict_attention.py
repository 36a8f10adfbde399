"""Causal attention in strict numerics: a query's result depends on it and its keys alone.

The keys are cut into blocks that start at position 0 and have a fixed size; the last is filled up.
Each product of queries and one block has a fixed shape, and the blocks are summed in their order.
Keys after a query have probability zero, which changes no sum. So the same bits come out in one
forward, in chunks, token by token with a cache, and in any batch.
"""

# Shapes: B batch, T queries, S keys, N query heads, K key-value heads (N = K * G), H head size,
# X = B * K, x of them at a time, t tokens of a tile, R = G * t its rows, b keys of a block,
# e keys that a tile may see, in whole blocks.

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.ops.numerics import autocast_inputs, check_alike
from plait.ops.row_exact import (
    ALIGNMENT_BYTES,
    REFERENCE_ROWS,
    SMALLEST_WHOLE,
    Product,
    cut,
    is_row_exact,
    refuse,
)

_BLOCK_KEYS = 128
_TILE_TOKENS = (REFERENCE_ROWS, 64, 32, 16, 4)
_SCORE_BYTES = 2**21
"""Scores held at a time. Measured on Zen 4 with 1 MiB of second-level cache: 1 to 4 MiB are alike,
16 MiB take 1.2 to 1.8 times as long."""


def strict_causal_attention(
    q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, *, scale: float
) -> Tensor:
    """Let the queries, the last T of S positions, attend to theirs and all earlier ones.

    Returns (B, N, T, H) in the dtype of the queries. Raises ModelError for shapes, dtypes or
    devices that do not fit together. The gradients of keys and values are
    sums over the queries, in a fixed order.
    """
    q_BNTH, k_BKSH, v_BKSH = autocast_inputs(q_BNTH, k_BKSH, v_BKSH)
    check_alike("strict_causal_attention", q_BNTH, k_BKSH, v_BKSH)
    _check_shapes(q_BNTH, k_BKSH, v_BKSH)
    return torch.ops.plait.strict_causal_attention(q_BNTH, k_BKSH, v_BKSH, scale)


def _check_shapes(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor) -> None:
    q, k, v = (tuple(x.shape) for x in (q_BNTH, k_BKSH, v_BKSH))
    if not (
        len(q) == len(k) == 4
        and k == v
        and (q[0], q[3]) == (k[0], k[3])
        and k[1] > 0
        and q[1] % k[1] == 0
        and q[2] <= k[2]
    ):
        raise ModelError(
            f"strict_causal_attention got queries {q}, keys {k} and values {v}. It needs "
            "(B, N, T, H), (B, K, S, H) and (B, K, S, H), N a multiple of K, and T at most S."
        )
    if q_BNTH.device.type not in ("cpu", "meta"):
        raise ModelError(
            f"strict_causal_attention runs on a cpu, got tensors on {q_BNTH.device}: on other "
            "devices the order of a softmax's sum depends on its length. Use numerics='fast'."
        )


@torch.library.custom_op("plait::strict_causal_attention", mutates_args=())
def _strict(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float) -> Tensor:
    output_BNTH = torch.empty_like(q_BNTH, memory_format=torch.contiguous_format)
    output_XGTH = _by_key_head(output_BNTH, k_BKSH)
    q_XGTH = _by_key_head(q_BNTH * scale, k_BKSH)
    k_XbH, v_XbH = _blocks(k_BKSH), _blocks(v_BKSH)
    with torch.autocast("cpu", enabled=False):
        for tile in _tiles(q_XGTH, k_BKSH):
            p_xRe = _probabilities(tile, tile.rows(q_XGTH), k_XbH)
            tile.write(output_XGTH, _times_blocks(p_xRe, v_XbH, tile))
    return output_BNTH


@_strict.register_fake
def _(q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q_BNTH, memory_format=torch.contiguous_format)


@torch.library.custom_op("plait::strict_causal_attention_backward", mutates_args=())
def _strict_backward(
    dout_BNTH: Tensor, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq_BNTH = torch.empty_like(q_BNTH, memory_format=torch.contiguous_format)
    dq_XGTH, dout_XGTH = _by_key_head(dq_BNTH, k_BKSH), _by_key_head(dout_BNTH, k_BKSH)
    q_XGTH = _by_key_head(q_BNTH * scale, k_BKSH)
    k_XbH, v_XbH = _blocks(k_BKSH), _blocks(v_BKSH)
    wide = torch.promote_types(k_BKSH.dtype, torch.float32)
    num_held = len(k_XbH) * _BLOCK_KEYS
    dk_XSH = torch.zeros(q_XGTH.shape[0], num_held, k_BKSH.shape[3], dtype=wide, device="cpu")
    dv_XSH = torch.zeros_like(dk_XSH)
    with torch.autocast("cpu", enabled=False):
        for tile in _tiles(q_XGTH, k_BKSH):
            q_xRH, dout_xRH = tile.rows(q_XGTH), tile.rows(dout_XGTH)
            p_xRe = _probabilities(tile, q_xRH, k_XbH)
            dp_xRe = _times_transposed_blocks(dout_xRH, v_XbH, tile)
            ds_xRe = torch.ops.aten._softmax_backward_data(dp_xRe, p_xRe, -1, p_xRe.dtype)
            tile.write(dq_XGTH, _times_blocks(ds_xRe, k_XbH, tile).mul_(scale))
            dk_XSH[tile.matrices, : tile.num_keys] += torch.bmm(ds_xRe.mT, q_xRH)
            dv_XSH[tile.matrices, : tile.num_keys] += torch.bmm(p_xRe.mT, dout_xRH)
    dk_BKSH, dv_BKSH = (
        d_XSH[:, : k_BKSH.shape[2]].to(k_BKSH.dtype).contiguous().view(k_BKSH.shape)
        for d_XSH in (dk_XSH, dv_XSH)
    )
    return dq_BNTH, dk_BKSH, dv_BKSH


@_strict_backward.register_fake
def _(
    dout_BNTH: Tensor, q_BNTH: Tensor, k_BKSH: Tensor, v_BKSH: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    new = torch.contiguous_format
    return (
        torch.empty_like(q_BNTH, memory_format=new),
        torch.empty_like(k_BKSH, memory_format=new),
        torch.empty_like(v_BKSH, memory_format=new),
    )


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout_BNTH: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dq, dk, dv = torch.ops.plait.strict_causal_attention_backward(
        dout_BNTH, *ctx.saved_tensors, ctx.scale
    )
    return dq, dk, dv, None


_strict.register_autograd(_backward, setup_context=_save)


@dataclass(frozen=True, kw_only=True)
class _Tile:
    """Some neighbouring queries of some key-value heads.

    num_tokens: what they are filled up to. first: position of the first query among the keys.
    num_keys: keys that the last query sees, in whole blocks.
    """

    matrices: slice
    tokens: slice
    num_tokens: int
    first: int
    num_keys: int

    def rows(self, x_XGTH: Tensor) -> Tensor:
        """Copy the tile's rows, those of one key-value head below each other: (x, R, H)."""
        x_xGtH = x_XGTH[self.matrices, :, self.tokens]
        missing = self.num_tokens - x_xGtH.shape[2]
        x_xGtH = torch.nn.functional.pad(x_xGtH, (0, 0, 0, missing)) if missing else x_xGtH
        return x_xGtH.contiguous().flatten(1, 2)

    def write(self, target_XGTH: Tensor, rows_xRH: Tensor) -> None:
        """Put the tile's rows in their place, without those that fill it up."""
        target_xGtH = target_XGTH[self.matrices, :, self.tokens]
        rows_xGtH = rows_xRH.unflatten(1, (-1, self.num_tokens))
        target_xGtH.copy_(rows_xGtH[:, :, : target_xGtH.shape[2]])


def _tiles(q_XGTH: Tensor, k_BKSH: Tensor) -> Iterator[_Tile]:
    num_matrices, groups, num_tokens, _ = q_XGTH.shape
    num_before = k_BKSH.shape[2] - num_tokens
    if not _are_exact(q_XGTH, 1, _TILE_TOKENS[0]):
        refuse(_products(q_XGTH, 1)[0])
    # Heads are taken one by one, or as many as have the bits of one and keep their scores in cache.
    token_tiles = cut(
        num_tokens, _TILE_TOKENS, partial(_are_exact, q_XGTH, 1), smallest_whole=SMALLEST_WHOLE
    )
    for start, stop, size in token_tiles:
        num_keys = -(-(num_before + stop) // _BLOCK_KEYS) * _BLOCK_KEYS
        most = max(1, _SCORE_BYTES // (groups * size * num_keys * q_XGTH.element_size()))
        powers = [2**n for n in reversed(range(most.bit_length()))]
        are_exact = partial(_are_exact, q_XGTH, num_tokens=size)
        for first, last, _ in cut(num_matrices, powers, are_exact):
            yield _Tile(
                matrices=slice(first, last),
                tokens=slice(start, stop),
                num_tokens=size,
                first=num_before + start,
                num_keys=num_keys,
            )


def _are_exact(q_XGTH: Tensor, num_matrices: int, num_tokens: int) -> bool:
    num_rows = q_XGTH.shape[1] * num_tokens
    return all(is_row_exact(product, num_rows) for product in _products(q_XGTH, num_matrices))


def _products(q_XGTH: Tensor, num_matrices: int) -> tuple[Product, Product]:
    """Describe the products with a block of keys, transposed and not."""
    head_size = q_XGTH.shape[3]
    with_transposed = Product(
        dtype=q_XGTH.dtype,
        device=q_XGTH.device,
        num_threads=torch.get_num_threads(),
        precision=torch.get_float32_matmul_precision(),
        num_matrices=num_matrices,
        inner=head_size,
        columns=_BLOCK_KEYS,
        is_transposed=True,
        reference_rows=q_XGTH.shape[1] * _TILE_TOKENS[0],
    )
    plain = replace(with_transposed, inner=_BLOCK_KEYS, columns=head_size, is_transposed=False)
    return with_transposed, plain


def _by_key_head(x_BNTH: Tensor, k_BKSH: Tensor) -> Tensor:
    """View the query heads by the key-value head they share, (X, G, T, H); may copy."""
    return x_BNTH.unflatten(1, (k_BKSH.shape[1], -1)).flatten(0, 1)


def _blocks(x_BKSH: Tensor) -> list[Tensor]:
    """Cut keys or values into blocks (X, b, H), the last filled up with zeros.

    They are views where the rows of each are aligned alike, else copies.
    """
    x_XSH = x_BKSH.flatten(0, 1)
    stride_bytes = x_XSH.stride(0) * x_XSH.element_size()
    is_plain = x_XSH.stride(2) == 1 and x_XSH.stride(1) == x_XSH.shape[2]
    if not is_plain or stride_bytes % ALIGNMENT_BYTES or x_XSH.data_ptr() % ALIGNMENT_BYTES:
        x_XSH = x_XSH.clone(memory_format=torch.contiguous_format)
    *whole, last_XSH = x_XSH.split(_BLOCK_KEYS, dim=1)
    missing = _BLOCK_KEYS - last_XSH.shape[1]
    return [*whole, torch.nn.functional.pad(last_XSH, (0, 0, 0, missing))]


def _probabilities(tile: _Tile, q_xRH: Tensor, k_XbH: list[Tensor]) -> Tensor:
    """Take the softmax of scaled queries over the keys that the tile may see: (x, R, e)."""
    scores_xRe = _times_transposed_blocks(q_xRH, k_XbH, tile)
    query_t1 = tile.first + torch.arange(tile.num_tokens, device=q_xRH.device)[:, None]
    unmasked = (tile.first + 1) // _BLOCK_KEYS * _BLOCK_KEYS
    later_tm = torch.arange(unmasked, tile.num_keys, device=q_xRH.device) > query_t1
    scores_xRe.unflatten(1, (-1, tile.num_tokens))[..., unmasked:].masked_fill_(
        later_tm, float("-inf")
    )
    return torch.softmax(scores_xRe, dim=-1)


def _times_transposed_blocks(a_xRH: Tensor, k_XbH: list[Tensor], tile: _Tile) -> Tensor:
    """Multiply by each block's transpose, side by side: (x, R, e)."""
    result_xRe = a_xRH.new_empty(*a_xRH.shape[:2], tile.num_keys)
    for keys in _key_slices(tile):
        k_xbH = k_XbH[keys.start // _BLOCK_KEYS][tile.matrices]
        torch.bmm(a_xRH, k_xbH.mT, out=result_xRe[:, :, keys])
    return result_xRe


def _times_blocks(a_xRe: Tensor, v_XbH: list[Tensor], tile: _Tile) -> Tensor:
    """Sum the products with each block, in order, at least in float32: (x, R, H)."""
    parts = (
        torch.bmm(a_xRe[:, :, keys], v_XbH[keys.start // _BLOCK_KEYS][tile.matrices])
        for keys in _key_slices(tile)
    )
    total_xRH = next(parts).to(torch.promote_types(a_xRe.dtype, torch.float32))
    for part_xRH in parts:
        total_xRH += part_xRH
    return total_xRH


def _key_slices(tile: _Tile) -> list[slice]:
    return [slice(s, s + _BLOCK_KEYS) for s in range(0, tile.num_keys, _BLOCK_KEYS)]
