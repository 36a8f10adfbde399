"""Finite volumes on nodes: assembly of -div(a grad u) + i w mu_0 b u and its derivative by cells.

Every node owns the quarters of its neighbour cells. The sides have no flux, so that each side of
the mesh turns into its own layered section; the bottom continues as a half-space under each column
with du/dz = -k u; the top is given by the mode. With these natural conditions the matrix is
symmetric and no boundary value depends on the model.
"""

from dataclasses import dataclass

import numpy as np

from plait.magnetotellurics.arrays import AnyArray, ComplexArray, RealArray
from plait.magnetotellurics.dissection import Dissection, dissect
from plait.magnetotellurics.elements import Elements
from plait.magnetotellurics.grid_factor import GridMatrix


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Cell sizes of the rows and columns on which one mode lives.

    Attributes:
        width_m: (n_y,).
        thickness_m: (n_z,).
        first_free_row: 1 where the field of the top row of nodes is given, else 0.
        plan: how the rows of nodes from there on are eliminated.
    """

    width_m: RealArray
    thickness_m: RealArray
    first_free_row: int
    plan: Dissection

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


def make_grid(*, width_m: RealArray, thickness_m: RealArray, top_is_given: bool) -> Grid:
    """Plan the elimination of the nodes once."""
    first = 1 if top_is_given else 0
    return Grid(
        width_m=np.asarray(width_m),
        thickness_m=np.asarray(thickness_m),
        first_free_row=first,
        plan=dissect(len(thickness_m) + 1 - first, len(width_m) + 1),
    )


def assemble(grid: Grid, elements: Elements) -> GridMatrix:
    """Assemble the symmetric matrices of all nodes, without flux at the sides and the top."""
    width, thickness = grid.width_m, grid.thickness_m
    values = np.zeros((len(elements.edge), 3, *grid.node_shape), dtype=np.complex128)
    diagonal, across, down = values[:, 0], values[:, 1, :, :-1], values[:, 2, :-1]
    share = elements.lateral * (thickness[:, None] / 2) / width
    across[:, :-1] -= share
    across[:, 1:] -= share
    share = elements.edge * (width / 2)
    down[:, :, :-1] -= share
    down[:, :, 1:] -= share
    diagonal += _to_nodes(elements.mass * (width / 2), elements.leak * (width / 2))
    diagonal[:, :, :-1] -= across
    diagonal[:, :, 1:] -= across
    diagonal[:, :-1] -= down
    diagonal[:, 1:] -= down
    return GridMatrix(values=values)


def _to_nodes(quarter: AnyArray, leak: AnyArray) -> ComplexArray:
    """Add each cell's quarter to its four nodes, and the leak of the last row to its two."""
    num_rows, num_columns = quarter.shape[-2:]
    nodes = np.zeros((*quarter.shape[:-2], num_rows + 1, num_columns + 1), dtype=np.complex128)
    nodes[..., :-1, :-1] += quarter
    nodes[..., :-1, 1:] += quarter
    nodes[..., 1:, :-1] += quarter
    nodes[..., 1:, 1:] += quarter
    nodes[..., -1, :-1] += leak
    nodes[..., -1, 1:] += leak
    return nodes


def derivative_by_cells(
    grid: Grid, elements: Elements, *, field: ComplexArray, adjoint: ComplexArray
) -> ComplexArray:
    """Give l^T (dA / d ln rho of each cell) u at one frequency.

    Args:
        grid: the nodes.
        elements: the coefficients at the present model, of this frequency.
        field: u, node_shape.
        adjoint: l, node_shape; one at a time, so that everything stays in a core's cache.

    Returns:
        (n_z, n_y).
    """
    half_width = grid.width_m / 2
    product = adjoint * field
    pairs = product[:, :-1] + product[:, 1:]
    found = pairs[:-1] + pairs[1:]
    found *= elements.mass_change * half_width
    down = (adjoint[1:] - adjoint[:-1]) * (field[1:] - field[:-1])
    pairs_down = down[:, :-1] + down[:, 1:]
    pairs_down *= elements.edge_change * half_width
    found += pairs_down
    if elements.lateral_change.any():
        across = (adjoint[:, 1:] - adjoint[:, :-1]) * (field[:, 1:] - field[:, :-1])
        lateral = elements.lateral_change * grid.thickness_m[:, None] / (2 * grid.width_m)
        found += (across[:-1] + across[1:]) * lateral
    found[-1] += elements.leak_change * half_width * pairs[-1]
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
