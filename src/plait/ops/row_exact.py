"""Matrix products in which a row's result depends on that row alone, bit for bit.

A library may sum a product in another order when the number of rows changes, or treat the rows at
the edge of a tile in another way. Here rows are multiplied in tiles of a few fixed sizes. What a
row must become is defined by one of them, `Product.reference_rows` rows of a single matrix; another
size is used only after a probe has shown that it gives the same bits wherever the row stands.
"""

# Shapes: X matrices multiplied side by side, M rows, K summed over, N columns, R rows of a probe.

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NoReturn

import torch
from torch import Tensor

from plait.errors import ModelError

REFERENCE_ROWS = 128
_ROW_COUNTS = (2048, 1024, 512, REFERENCE_ROWS, 32, 16, 4)
SMALLEST_WHOLE = 16
"""Tiles of fewer rows are only the last of a call: so all start at aligned addresses."""
ALIGNMENT_BYTES = 64
"""A cache line, and the width of the widest vectors: kernels may treat other addresses apart."""
_WIDTH_MULTIPLES = (2, 16)
"""Widths are made even, so that tiles of 16 rows start at aligned addresses in two-byte dtypes. MKL
treats rows of few and odd sizes, such as 7, by address; then 16 float32 fill an aligned line."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """All that a kernel may be chosen by, except the number of rows.

    precision: of float32 products, as `torch.set_float32_matmul_precision` has it. num_matrices:
    None for a plain product, else the matrices of a batched one. is_transposed: the right side
    (K, N) is stored as (N, K).
    """

    dtype: torch.dtype
    device: torch.device
    num_threads: int
    precision: str
    num_matrices: int | None
    inner: int
    columns: int
    is_transposed: bool
    reference_rows: int = REFERENCE_ROWS


def multiply_rows(x_MK: Tensor, w_KN: Tensor) -> Tensor:
    """Return x @ w, (M, N); no row of it depends on the number, order or values of the others."""
    num_rows, num_columns = x_MK.shape[0], w_KN.shape[1]
    is_transposed = w_KN.t().is_contiguous() and not w_KN.is_contiguous()
    product = _choose_widths(
        Product(
            dtype=x_MK.dtype,
            device=x_MK.device,
            num_threads=torch.get_num_threads(),
            precision=torch.get_float32_matmul_precision(),
            num_matrices=None,
            inner=w_KN.shape[0],
            columns=num_columns,
            is_transposed=is_transposed,
        )
    )
    x_MK = _filled(x_MK, num_rows, product.inner)
    if is_transposed:
        w_KN = _filled(w_KN.t(), product.columns, product.inner).t()
    else:
        w_KN = _filled(w_KN, product.inner, product.columns)
    y_MN = x_MK.new_empty(num_rows, product.columns)
    is_exact = partial(is_row_exact, product)
    for start, stop, size in cut(num_rows, _ROW_COUNTS, is_exact, smallest_whole=SMALLEST_WHOLE):
        if stop - start == size:
            torch.mm(x_MK[start:stop], w_KN, out=y_MN[start:stop])
        else:
            y_mN = torch.mm(_filled(x_MK[start:stop], size, product.inner), w_KN)
            y_MN[start:stop] = y_mN[: stop - start]
    return y_MN[:, :num_columns].contiguous()


def cut(
    num_rows: int, sizes: Sequence[int], is_exact: Callable[[int], bool], *, smallest_whole: int = 1
) -> Iterator[tuple[int, int, int]]:
    """Cut rows into (start, stop, size): whole tiles, the largest first, then one to be filled up.

    sizes: falling; those below `smallest_whole` only serve for the last tile. A size is asked for
    only where it would be used, so that a server that only decodes never probes the large ones.
    """
    start = 0
    for size in sizes:
        if size >= smallest_whole and num_rows - start >= size and is_exact(size):
            num_tiles = (num_rows - start) // size
            yield from ((start + i * size, start + (i + 1) * size, size) for i in range(num_tiles))
            start += num_tiles * size
    if start < num_rows:
        enough = (size for size in reversed(sizes) if size >= num_rows - start)
        yield start, num_rows, next(size for size in enough if is_exact(size))


def refuse(product: Product) -> NoReturn:
    """Raise ModelError: the result of a row depends on its place even in tiles of the reference."""
    raise ModelError(
        f"strict numerics are not to be had for a product of (rows, {product.inner}) and "
        f"({product.inner}, {product.columns}) in {product.dtype} with {product.num_threads} "
        f"threads on this {product.device.type}: in tiles of {product.reference_rows} rows the "
        "result of a row depends on its place. Use numerics='fast'."
    )


@cache
def is_row_exact(product: Product, num_rows: int) -> bool:
    """Probe whether tiles of `num_rows` give the bits of the reference, in every place.

    The kernel is chosen by shape, never by value, so that one set of values tells. They are made to
    tell: the sums cancel, so that what is left is rounding, and any other order of summation shows.
    """
    generator = torch.Generator().manual_seed(0)
    x_XRK, w_XKN = _telling_values(product, max(num_rows, product.reference_rows), generator)
    alone = replace(product, num_matrices=product.num_matrices and 1)
    expected_XRN = torch.cat(
        [
            _in_tiles(alone, x_XRK[i : i + 1], w_XKN[i : i + 1], product.reference_rows)
            for i in range(x_XRK.shape[0])
        ]
    )
    for _ in range(2):
        order_R = torch.randperm(x_XRK.shape[1], generator=generator, device="cpu")
        order_R = order_R.to(product.device)
        found_XRN = _in_tiles(product, x_XRK[:, order_R], w_XKN, num_rows)
        if not torch.equal(found_XRN, expected_XRN[:, order_R]):
            return False
    return True


def _telling_values(
    product: Product, num_rows: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Make x and w whose products are zero but for rounding: x = (a, -a), w = (b, b), shuffled.

    In order, a kernel that sums one half after the other would leave nothing of its rounding.
    """
    num_matrices, half = product.num_matrices or 1, product.inner // 2
    a_XRh = torch.randn(num_matrices, num_rows, half, generator=generator, device="cpu")
    a_XRh *= 2.0 ** torch.randint(-4, 5, (half,), generator=generator, device="cpu")
    # A large weight is filled by repeating one of its parts: drawing all of it takes seconds.
    part = min(half, 1024)
    b_XhN = torch.randn(num_matrices, part, product.columns, generator=generator, device="cpu")
    b_XhN = b_XhN.repeat(1, -(-half // part), 1)[:, :half]
    w_XKN = torch.nn.functional.pad(torch.cat((b_XhN, b_XhN), 1), (0, 0, 0, product.inner % 2))
    x_XRK = torch.nn.functional.pad(torch.cat((a_XRh, -a_XRh), 2), (0, product.inner % 2))
    order_K = torch.randperm(product.inner, generator=generator, device="cpu")
    x_XRK, w_XKN = x_XRK[:, :, order_K], w_XKN[:, order_K]
    x_XRK, w_XKN = (values.to(product.device, product.dtype) for values in (x_XRK, w_XKN))
    return x_XRK, w_XKN.mT.contiguous().mT if product.is_transposed else w_XKN


def _in_tiles(product: Product, x_XRK: Tensor, w_XKN: Tensor, num_rows: int) -> Tensor:
    parts = [part.contiguous() for part in x_XRK.split(num_rows, dim=1)]
    if product.num_matrices is None:
        return torch.cat([torch.mm(part[0], w_XKN[0])[None] for part in parts], dim=1)
    return torch.cat([torch.bmm(part, w_XKN) for part in parts], dim=1)


def _choose_widths(product: Product) -> Product:
    """Widen the product with zeros until its rows are exact: seldom more than nothing."""
    for multiple in _WIDTH_MULTIPLES:
        inner, columns = (-(-n // multiple) * multiple for n in (product.inner, product.columns))
        widened = replace(product, inner=inner, columns=columns)
        if is_row_exact(widened, widened.reference_rows):
            return widened
    refuse(product)


def _filled(x_MN: Tensor, num_rows: int, num_columns: int) -> Tensor:
    """Make contiguous and aligned, with zeros below and on the right up to the given shape."""
    missing = num_columns - x_MN.shape[1], num_rows - x_MN.shape[0]
    if any(missing):
        x_MN = torch.nn.functional.pad(x_MN, (0, missing[0], 0, missing[1]))
    x_MN = x_MN.contiguous()
    return x_MN if x_MN.data_ptr() % ALIGNMENT_BYTES == 0 else x_MN.clone()
