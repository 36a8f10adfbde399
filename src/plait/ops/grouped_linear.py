"""One matrix for each group of rows: what a layer of experts multiplies.

Rows stand sorted by group, so that a group is a slice. Shapes do not depend on where slices end,
which lets a compiler see the layer whole.
"""

# Shapes: R rows, G groups, I inputs, O outputs.

from collections.abc import Iterator

import torch
from torch import Tensor

from plait.errors import ModelError
from plait.ops.numerics import autocast_inputs
from plait.ops.work import Work, num_bytes


def grouped_linear(x_RI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """Multiply rows [ends[g-1], ends[g]) by weight[g].T: (R, O) in the dtype of the rows.

    ends: int64, not falling, the last being R. Under autocast products run in its dtype. Raises
    ModelError for shapes that do not fit; what the ends are is not looked at.
    """
    _check(x_RI, weight_GOI, ends_G)
    x_RI, weight_GOI = autocast_inputs(x_RI, weight_GOI)
    return torch.ops.plait.grouped_linear(x_RI, weight_GOI, ends_G)


def reference_grouped_linear(x_RI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """Give every row its own copy of a matrix."""
    rows_R = torch.arange(len(x_RI), device=x_RI.device)
    group_R = torch.searchsorted(ends_G, rows_R, right=True)
    return torch.einsum("ri,roi->ro", x_RI, weight_GOI[group_R])


def grouped_linear_work(x_RI: Tensor, weight_GOI: Tensor) -> tuple[Work, Work]:
    """Each row is multiplied once, by the matrix of its group, however rows are routed."""
    (rows, inner), columns = x_RI.shape, weight_GOI.shape[1]
    out_bytes = rows * columns * x_RI.element_size()
    moved = num_bytes(x_RI, weight_GOI)
    forward = Work(flops=2 * rows * inner * columns, bytes=moved + out_bytes)
    return forward, Work(flops=2 * forward.flops, bytes=2 * moved + out_bytes)


def _check(x_RI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> None:
    shapes = [tuple(t.shape) for t in (x_RI, weight_GOI, ends_G)]
    if (
        [len(shape) for shape in shapes] != [2, 3, 1]
        or shapes[0][1] != shapes[1][2]
        or shapes[1][0] != shapes[2][0]
        or ends_G.dtype != torch.int64
    ):
        raise ModelError(
            "grouped_linear needs rows (R, I), weights (G, O, I) and int64 ends (G,), "
            f"got {shapes} and {ends_G.dtype}."
        )


@torch.library.custom_op("plait::grouped_linear", mutates_args=())
def _grouped(x_RI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    output_RO = x_RI.new_empty(x_RI.shape[0], weight_GOI.shape[1])
    for group, rows in _groups(ends_G):
        torch.mm(x_RI[rows], weight_GOI[group].T, out=output_RO[rows])
    return output_RO


@_grouped.register_fake
def _(x_RI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_GOI.shape[1])


@torch.library.custom_op("plait::grouped_linear_backward", mutates_args=())
def _grouped_backward(
    dout_RO: Tensor, x_RI: Tensor, weight_GOI: Tensor, ends_G: Tensor
) -> tuple[Tensor, Tensor]:
    dx_RI = x_RI.new_empty(x_RI.shape)
    dweight_GOI = weight_GOI.new_zeros(weight_GOI.shape)
    for group, rows in _groups(ends_G):
        torch.mm(dout_RO[rows], weight_GOI[group], out=dx_RI[rows])
        torch.mm(dout_RO[rows].T, x_RI[rows], out=dweight_GOI[group])
    return dx_RI, dweight_GOI


@_grouped_backward.register_fake
def _(dout_RO: Tensor, x_RI: Tensor, weight_GOI: Tensor, ends_G: Tensor) -> tuple[Tensor, Tensor]:
    return x_RI.new_empty(x_RI.shape), weight_GOI.new_empty(weight_GOI.shape)


def _save(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.plait.grouped_linear_backward(dout_RO.contiguous(), *ctx.saved_tensors), None


_grouped.register_autograd(_backward, setup_context=_save)


def _groups(ends_G: Tensor) -> Iterator[tuple[int, slice]]:
    """Groups that have rows, with their rows. On a GPU the host waits here for the device."""
    start = 0
    for group, end in enumerate(ends_G.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = end
