"""What a receiver sees: sparse rows that turn nodal fields into Ex, Hy, Hz and Ey at the surface.

The flux through the surface comes from the balance of the half volumes under it, which is of
second order on graded rows and uses one row of cells only.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np

from plait.errors import EarthError
from plait.magnetotellurics.arrays import ComplexArray, IndexArray, RealArray
from plait.magnetotellurics.earth import Mesh
from plait.magnetotellurics.elements import Elements
from plait.magnetotellurics.grid_operator import Grid


class OnNode(Enum):
    """Which resistivity a TM receiver on a node between two columns takes.

    MEAN is the inverse of the mean conductivity of both; RIGHT is the cell on the right, as in
    ModEM. They differ only where a contact reaches the surface at the node.
    """

    MEAN = "mean"
    RIGHT = "right"


_ON_NODE = 1e-6  # share of a column's width within which a receiver stands on its node


@dataclass(frozen=True, kw_only=True)
class Receivers:
    """Receivers on the surface of a mesh.

    Attributes:
        column: (n_rx,) the column that holds each receiver.
        row: (n_rx,) node row of the surface there.
        share: (n_rx,) weight of the right node of that column, from 0 to 1.
        left_column, right_column: (n_rx,) the same column, or the two that meet at the node on
            which a receiver stands; there TM takes the mean conductivity of these.
    """

    column: IndexArray
    row: IndexArray
    share: RealArray
    left_column: IndexArray
    right_column: IndexArray

    @property
    def num_receivers(self) -> int:
        """How many there are."""
        return len(self.column)


def place_receivers(
    mesh: Mesh, position_m: RealArray, *, on_node: OnNode = OnNode.MEAN
) -> Receivers:
    """Find the column, the surface row and the weights of each receiver.

    Raises:
        EarthError: a receiver outside the mesh, in the outermost columns, or on the edge of a
            terrain step.
    """
    position = np.asarray(position_m, dtype=float)
    column = np.searchsorted(mesh.y_m, position, side="right") - 1
    inside = (column >= 1) & (column <= len(mesh.y_m) - 3)
    if not inside.all():
        raise EarthError(
            f"receivers at y = {position[~inside]} m lie outside the mesh "
            f"({mesh.y_m[1]:g} to {mesh.y_m[-2]:g} m) or in its outermost columns"
        )
    share = (position - mesh.y_m[column]) / mesh.width_m[column]
    share = np.where(share < _ON_NODE, 0.0, np.where(share > 1 - _ON_NODE, 1.0, share))
    left = np.where(share == 0.0, column - 1, column)
    right = np.where(share == 1.0, column + 1, column)
    if on_node is OnNode.RIGHT:
        left = right
    steps = mesh.terrain_row[left] != mesh.terrain_row[right]
    if steps.any():
        raise EarthError(
            f"receivers at y = {position[steps]} m stand on the edge of a terrain step; move them "
            "off the node"
        )
    return Receivers(
        column=column,
        row=mesh.terrain_row[column],
        share=share,
        left_column=left,
        right_column=right,
    )


@dataclass(frozen=True)
class Row:
    """One functional: sum of weight * u[node] at flat node indices, for each receiver.

    node and weight are (n_rx, n_points); direct_cell and direct_weight (n_rx, n_cells) say how
    the functional itself changes with ln rho of cells of the surface row (flat cell index).
    """

    node: IndexArray
    weight: ComplexArray
    direct_cell: IndexArray
    direct_weight: ComplexArray

    def value(self, field: ComplexArray) -> ComplexArray:
        """Evaluate at a field of nodes, (n_rx,)."""
        return (self.weight * field.ravel()[self.node]).sum(axis=1)


def te_rows(
    receivers: Receivers,
    *,
    grid: Grid,
    elements: Elements,
    field: ComplexArray,
    induction: complex,
) -> tuple[Row, Row, Row]:
    """Give the functionals of Ex, Hy and Hz for TE.

    Hy = -(1 / i w mu_0) dEx/dz and Hz = (1 / i w mu_0) dEx/dy. The surface flux of a node's half
    volume (half width w) is w dEx/dz = sum over its two cells, of half width v and height h, of
    v edge (u_below - u) - v mass u + h (u_side - u) / (4 v).
    """
    width, num_columns = grid.width_m, len(grid.width_m) + 1
    row, column = receivers.row, receivers.column
    surface = row[:, None] * num_columns + column[:, None]
    below = surface + num_columns + np.arange(2)
    points = np.concatenate([surface + np.arange(-1, 3), below], axis=1)
    flux = np.zeros((len(column), 6), dtype=np.complex128)
    slope = np.zeros((len(column), 6), dtype=np.complex128)
    direct = np.zeros((len(column), 3), dtype=np.complex128)
    for side, share in enumerate((1 - receivers.share, receivers.share)):
        here = column + side
        at, under = 1 + side, 4 + side
        left, right = width[here - 1], width[here]
        for offset, own in ((0, left), (1, right)):
            cell = (row, here - 1 + offset)
            part = share * own / (left + right)
            flux[:, under] += part * elements.edge[cell]
            flux[:, at] -= part * (elements.edge[cell] + elements.mass[cell])
            lateral = share * grid.thickness_m[row] / (own * (left + right))
            flux[:, at - 1 + 2 * offset] += lateral
            flux[:, at] -= lateral
            drop = field[row + 1, here] - field[row, here]
            direct[:, side + offset] += part * (
                elements.edge_change[cell] * drop - elements.mass_change[cell] * field[row, here]
            )
        # The second-order derivative on uneven columns.
        slope[:, at - 1] -= share * right / (left * (left + right))
        slope[:, at + 1] += share * left / (right * (left + right))
        slope[:, at] += share * (right - left) / (left * right)
    cells = row[:, None] * len(width) + column[:, None] + np.arange(-1, 2)
    electric = np.stack([1 - receivers.share, receivers.share], axis=1).astype(complex)
    return (
        Row(surface + np.arange(2), electric, cells, np.zeros_like(direct)),
        Row(points, -flux / induction, cells, -direct / induction),
        Row(points, slope / induction, cells, np.zeros_like(direct)),
    )


def tm_row(
    receivers: Receivers, *, grid: Grid, elements: Elements, field: ComplexArray, first_row: int
) -> Row:
    """Give the functional of Ey for TM; Hx is 1 on the surface, so that it is Zyx itself.

    Ey = rho dHx/dz. dHx/dz is the surface current, continuous across contacts, so it is what is
    interpolated: at a node it is the mean over both cells of sigma (edge (u_below - u) - mass u).
    rho is that of the receiver's cell, and on a node the inverse of the mean conductivity.

    first_row is the mesh row on which the TM grid begins.
    """
    width, num_columns = grid.width_m, len(grid.width_m) + 1
    row, column = receivers.row - first_row, receivers.column
    surface = row[:, None] * num_columns + column[:, None] + np.arange(2)
    points = np.concatenate([surface, surface + num_columns], axis=1)
    weight = np.zeros((len(column), 4), dtype=np.complex128)
    direct = np.zeros((len(column), 3), dtype=np.complex128)
    for side, share in enumerate((1 - receivers.share, receivers.share)):
        here = column + side
        both = width[here - 1] + width[here]
        level = field[row, here]
        drop = field[row + 1, here] - level
        for offset in (0, 1):
            cell = (row, here - 1 + offset)
            part = share * width[here - 1 + offset] / both / elements.lateral[cell]
            edge, mass = elements.edge[cell], elements.mass[cell]
            weight[:, 2 + side] += part * edge
            weight[:, side] -= part * (edge + mass)
            direct[:, side + offset] += part * (
                (elements.edge_change[cell] - edge) * drop
                - (elements.mass_change[cell] - mass) * level
            )
    rows = np.arange(len(column))
    through = []
    for beside in (receivers.left_column, receivers.right_column):
        through.append(width[beside] / elements.lateral[row, beside])
    total = through[0] + through[1]
    mean = total / (width[receivers.left_column] + width[receivers.right_column])
    current = (weight * field.ravel()[points]).sum(axis=1)
    for beside, part in zip((receivers.left_column, receivers.right_column), through, strict=True):
        np.add.at(direct, (rows, beside - column + 1), current * part / total)
    cells = row[:, None] * len(width) + column[:, None] + np.arange(-1, 2)
    return Row(points, weight / mean[:, None], cells, direct / mean[:, None])
