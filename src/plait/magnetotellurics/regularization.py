"""Roughness of a model as a symmetric positive definite matrix, and parts to add to it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.arrays import BoolArray, IndexArray, RealArray
from plait.magnetotellurics.earth import Mesh
from plait.magnetotellurics.linear_solver import sparse
from plait.magnetotellurics.model_map import ModelMap


@dataclass(frozen=True, kw_only=True)
class Smoothness:
    """Weights of first differences between neighbour cells or bricks.

    m^T R m = horizontal * sum (side differences)^2 + vertical * sum (up-down differences)^2
    + closeness * sum m^2, m measured from the reference model. Differences are not divided by
    distance: cells grow with depth as resolution falls [deGroot-Hedlin and Constable 1990, eq. 3].
    """

    horizontal: float = 1.0
    vertical: float = 1.0
    closeness: float = 1e-3

    def __post_init__(self) -> None:
        if self.horizontal < 0 or self.vertical < 0 or self.closeness <= 0:
            raise InversionError("weights must not be negative, and closeness must be positive")


def roughness_matrix(
    model_map: ModelMap, *, thickness_m: RealArray, width_m: RealArray, smoothness: Smoothness
) -> Any:
    """Build R, sparse (n_parameters, n_parameters).

    Two bricks that share an edge are joined with the shared length over the shorter one's own
    length of that edge, so that equal neighbours count 1.
    """
    index = model_map.parameter_of_cell
    count = model_map.num_parameters
    total = smoothness.closeness * sparse.eye_array(count, format="csr")
    sides = np.broadcast_to(thickness_m[:, None], index.shape)
    tops = np.broadcast_to(width_m[None, :], index.shape)
    for weight, first, second, length in (
        (smoothness.horizontal, index[:, :-1], index[:, 1:], sides[:, 1:]),
        (smoothness.vertical, index[:-1], index[1:], tops[1:]),
    ):
        if weight:
            total = total + weight * _edges(first.ravel(), second.ravel(), length.ravel(), count)
    return sparse.csc_array(total)


def _edges(first: IndexArray, second: IndexArray, length: RealArray, count: int) -> Any:
    """Sum (m_i - m_j)^2 over pairs, weighted by shared length over the longest shared length."""
    joined = (first != second) & (first >= 0) & (second >= 0)
    low = np.minimum(first, second)[joined]
    high = np.maximum(first, second)[joined]
    pairs, where = np.unique(low * count + high, return_inverse=True)
    shared = np.bincount(where, weights=length[joined])
    low, high = pairs // count, pairs % count
    longest = np.zeros(count)
    np.add.at(longest, low, shared)
    reach = np.zeros(count)
    np.add.at(reach, high, shared)
    weight = shared / np.minimum(longest[low], reach[high])
    rows = np.concatenate([low, high, low, high])
    columns = np.concatenate([low, high, high, low])
    values = np.concatenate([weight, weight, -weight, -weight])
    return sparse.csr_array((values, (rows, columns)), shape=(count, count))


def with_static_shifts(roughness: Any, *, num_shifts: int, weight: float) -> Any:
    """Append a penalty weight * s^2 for each static shift parameter."""
    shifts = weight * sparse.eye_array(num_shifts, format="csr")
    return sparse.csc_array(sparse.block_diag((roughness, shifts)))


def cell_roughness(
    mesh: Mesh, *, smoothness: Smoothness, inside: BoolArray, inside_smoothness: Smoothness
) -> Any:
    """Build R of a mesh's cells with other weights inside a region.

    A pair of neighbours counts as inside if both cells are; terrain air has no neighbours.

    Args:
        mesh: of the section.
        smoothness: weights outside.
        inside: mesh.ground_shape, the region.
        inside_smoothness: weights inside; its closeness is not used there, since codes have theirs.

    Returns:
        Sparse (n_cells, n_cells), in row-major order of mesh.ground_shape.
    """
    index = np.arange(mesh.is_ground.size).reshape(mesh.ground_shape)
    count = index.size
    close = np.where(mesh.is_ground & ~inside, smoothness.closeness, 0.0)
    total = sparse.diags_array(close.ravel(), format="csr")
    for name, first, second in (
        ("horizontal", index[:, :-1], index[:, 1:]),
        ("vertical", index[:-1], index[1:]),
    ):
        both = inside.ravel()[first] & inside.ravel()[second]
        ground = mesh.is_ground.ravel()[first] & mesh.is_ground.ravel()[second]
        weight = np.where(both, getattr(inside_smoothness, name), getattr(smoothness, name))
        weight = (weight * ground).ravel()
        pairs = np.arange(len(weight))
        ends = (first.ravel(), second.ravel())
        step = sparse.csr_array(
            (np.repeat([-1.0, 1.0], len(pairs)), (np.tile(pairs, 2), np.concatenate(ends))),
            shape=(len(pairs), count),
        )
        total = total + step.T @ sparse.diags_array(weight) @ step
    return sparse.csc_array(total)
