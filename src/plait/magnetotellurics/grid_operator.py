"""Finite volumes on nodes: assembly of -div(a grad u) + i w mu_0 b u and its derivative by cells.

Every node owns the quarters of its neighbour cells. The sides have no flux, so that each side of
the mesh turns into its own layered section; the bottom continues as a half-space under each column
with du/dz = -k u; the top is given by the mode. With these natural conditions the matrix is
symmetric and no boundary value depends on the model.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.magnetotellurics.arrays import AnyArray, ComplexArray, IndexArray, RealArray
from plait.magnetotellurics.elements import Elements
from plait.magnetotellurics.linear_solver import dissection_order, sparse


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cell sizes of the rows and columns on which one mode lives, and the fixed sparsity.

    Attributes:
        width_m: (n_y,).
        thickness_m: (n_z,).
        rows, columns: where the matrix entries of _entries stand.
        order: fill-reducing order of the nodes.
    """

    width_m: RealArray
    thickness_m: RealArray
    rows: IndexArray
    columns: IndexArray
    order: IndexArray

    @property
    def node_shape(self) -> tuple[int, int]:
        """Rows and columns of nodes."""
        return len(self.thickness_m) + 1, len(self.width_m) + 1

    @property
    def node_width_m(self) -> RealArray:
        """The width that each column of nodes owns, (n_y + 1,)."""
        owned = np.zeros(len(self.width_m) + 1)
        owned[:-1] += self.width_m / 2
        owned[1:] += self.width_m / 2
        return owned


def make_grid(*, width_m: RealArray, thickness_m: RealArray) -> Grid:
    """Number the nodes row by row and lay out the sparsity once."""
    shape = (len(thickness_m) + 1, len(width_m) + 1)
    node = np.arange(shape[0] * shape[1]).reshape(shape)
    left, right = node[:, :-1].ravel(), node[:, 1:].ravel()
    upper, lower = node[:-1].ravel(), node[1:].ravel()
    diagonal = node.ravel()
    return Grid(
        width_m=np.asarray(width_m),
        thickness_m=np.asarray(thickness_m),
        rows=np.concatenate([left, right, upper, lower, diagonal]),
        columns=np.concatenate([right, left, lower, upper, diagonal]),
        order=dissection_order(*shape),
    )


def assemble(grid: Grid, elements: Elements) -> Any:
    """Assemble the symmetric matrix, (n_nodes, n_nodes) complex, without flux at sides and top."""
    width, thickness = grid.width_m, grid.thickness_m
    across = np.zeros((len(thickness) + 1, len(width)))
    share = elements.lateral * (thickness[:, None] / 2) / width
    across[:-1] += share
    across[1:] += share
    down = np.zeros((len(thickness), len(width) + 1), dtype=np.complex128)
    share = elements.edge * (width / 2)
    down[:, :-1] += share
    down[:, 1:] += share
    diagonal = _to_nodes(elements.mass * (width / 2), elements.leak * (width / 2))
    diagonal[:, :-1] += across
    diagonal[:, 1:] += across
    diagonal[:-1] += down
    diagonal[1:] += down
    across, down = -across.ravel(), -down.ravel()
    values = np.concatenate([across, across, down, down, diagonal.ravel()])
    size = diagonal.size
    return sparse.csr_array((values, (grid.rows, grid.columns)), shape=(size, size))


def _to_nodes(quarter: AnyArray, leak: AnyArray) -> ComplexArray:
    """Add each cell's quarter to its four nodes, and the leak of the last row to its two."""
    nodes = np.zeros((quarter.shape[0] + 1, quarter.shape[1] + 1), dtype=np.complex128)
    nodes[:-1, :-1] += quarter
    nodes[:-1, 1:] += quarter
    nodes[1:, :-1] += quarter
    nodes[1:, 1:] += quarter
    nodes[-1, :-1] += leak
    nodes[-1, 1:] += leak
    return nodes


def derivative_by_cells(
    grid: Grid, elements: Elements, *, field: ComplexArray, adjoint: ComplexArray
) -> ComplexArray:
    """Give l^T (dA / d ln rho of each cell) u.

    Args:
        grid: the nodes.
        elements: the coefficients at the present model.
        field: u, node_shape.
        adjoint: l, (n, *node_shape).

    Returns:
        (n, n_z, n_y).
    """
    half_width = grid.width_m / 2
    product = adjoint * field
    corners = product[:, :-1, :-1] + product[:, :-1, 1:]
    corners += product[:, 1:, :-1]
    corners += product[:, 1:, 1:]
    found = corners * (elements.mass_change * half_width)
    down = np.diff(adjoint, axis=1) * np.diff(field, axis=0)
    found += (down[:, :, :-1] + down[:, :, 1:]) * (elements.edge_change * half_width)
    if elements.lateral_change.any():
        across = np.diff(adjoint, axis=2) * np.diff(field, axis=1)
        lateral = elements.lateral_change * grid.thickness_m[:, None] / (2 * grid.width_m)
        found += (across[:, :-1] + across[:, 1:]) * lateral
    leak = elements.leak_change * half_width
    found[:, -1] += leak * (product[:, -1, :-1] + product[:, -1, 1:])
    return found


def apply_change(
    grid: Grid, elements: Elements, *, field: ComplexArray, change: RealArray
) -> ComplexArray:
    """Give (sum over cells of change * dA / d ln rho) u as an array of node_shape.

    It is the transpose of derivative_by_cells: l^T of this equals the sum over cells of
    change * derivative.
    """
    half_width = grid.width_m / 2
    found = field * _to_nodes(
        change * elements.mass_change * half_width, change[-1] * elements.leak_change * half_width
    )
    down = change * elements.edge_change * half_width
    slope = np.diff(field, axis=0)
    for columns in (slice(None, -1), slice(1, None)):
        flux = down * slope[:, columns]
        found[1:, columns] += flux
        found[:-1, columns] -= flux
    across = change * elements.lateral_change * grid.thickness_m[:, None] / (2 * grid.width_m)
    slope = np.diff(field, axis=1)
    for rows in (slice(None, -1), slice(1, None)):
        flux = across * slope[rows]
        found[rows, 1:] += flux
        found[rows, :-1] -= flux
    return found
