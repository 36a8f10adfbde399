"""A section of pixels and codes: the codes of a learnt prior stand for its sub-regions.

    m = E p + sum_j S_j decode(v_j),    dm = E dp + sum_j S_j (d decode / d v_j) dv_j

p are log10 rho of the cells outside the region, v_j the code of sub-region j. One code for the
whole region is the case of a single sub-region. The parameters are p, then v_1, v_2 ...
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.arrays import BoolArray, IndexArray, RealArray
from plait.magnetotellurics.earth import Mesh
from plait.magnetotellurics.linear_solver import sparse
from plait.magnetotellurics.prior_network import CodeGrid, PriorNetwork


@dataclass(frozen=True, kw_only=True)
class Region:
    """Cells that a prior describes: ground rows and columns of a mesh, ends not included."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    def grid(self, mesh: Mesh, *, columns_per_code: int) -> CodeGrid:
        """Give the cells of one code.

        Raises:
            InversionError: a region outside the mesh or with terrain in it; sub-regions that do
                not fill it; neighbours of several columns with different widths.
        """
        (top, bottom), (left, right) = self.rows, self.columns
        num_rows, num_columns = mesh.ground_shape
        if not (0 <= top < bottom <= num_rows and 0 <= left < right <= num_columns):
            raise InversionError(f"the region {self} lies outside the ground {mesh.ground_shape}")
        if not mesh.is_ground[top:bottom, left:right].all():
            raise InversionError("the region holds air of the terrain; begin it deeper")
        if columns_per_code < 1 or (right - left) % columns_per_code:
            raise InversionError(
                f"{columns_per_code} columns per code do not divide the region's {right - left}"
            )
        width = mesh.width_m[left:right].reshape(-1, columns_per_code)
        if columns_per_code > 1 and not np.allclose(width, width[0], rtol=1e-3):
            raise InversionError("sub-regions of several columns need equal column widths")
        depth = mesh.z_m[mesh.num_air :] - mesh.z_m[mesh.num_air]
        middle = (mesh.y_m[1:] + mesh.y_m[:-1]) / 2
        return CodeGrid(
            z_m=depth[top : bottom + 1],
            y_m=middle[left : left + columns_per_code] - middle[left],
        )


@dataclass(frozen=True, kw_only=True)
class CodedSection:
    """The SectionMap of pixels and codes.

    Attributes:
        mesh: of the section.
        region: where the prior speaks.
        network: learnt on region.grid(mesh, columns_per_code=...).
        fixed_log10_rho: of terrain air; of no effect.
    """

    mesh: Mesh
    region: Region
    network: PriorNetwork
    fixed_log10_rho: float = 2.0

    def __post_init__(self) -> None:
        width = self.network.grid.shape[1]
        grid = self.region.grid(self.mesh, columns_per_code=width)
        same = grid.shape == self.network.grid.shape and np.allclose(
            grid.z_m, self.network.grid.z_m, rtol=1e-6
        )
        if not same:
            raise InversionError(
                "the network was learnt on other cells than the region's; learn the prior again "
                "for this mesh"
            )

    @cached_property
    def inside(self) -> BoolArray:
        """Where the prior speaks, mesh.ground_shape."""
        inside = np.zeros(self.mesh.ground_shape, dtype=bool)
        inside[slice(*self.region.rows), slice(*self.region.columns)] = True
        return inside

    @cached_property
    def pixel_cells(self) -> IndexArray:
        """Flat indices of the cells outside the region, (n_pixels,)."""
        return np.flatnonzero(self.mesh.is_ground & ~self.inside)

    @cached_property
    def code_cells(self) -> IndexArray:
        """Flat indices of each sub-region's cells, (n_codes, n_cells of a code)."""
        index = np.arange(self.mesh.is_ground.size).reshape(self.mesh.ground_shape)
        inside = index[slice(*self.region.rows), slice(*self.region.columns)]
        rows, width = self.network.grid.shape
        parts = inside.reshape(rows, -1, width).transpose(1, 0, 2)
        return parts.reshape(parts.shape[0], -1)

    @property
    def num_codes(self) -> int:
        """Sub-regions."""
        return len(self.code_cells)

    @property
    def code_y_m(self) -> RealArray:
        """Give the middles of the sub-regions, (n_codes,)."""
        middle = (self.mesh.y_m[1:] + self.mesh.y_m[:-1]) / 2
        return middle[slice(*self.region.columns)].reshape(self.num_codes, -1).mean(1)

    @property
    def num_parameters(self) -> int:
        """Pixels and all codes' numbers."""
        return len(self.pixel_cells) + self.num_codes * self.network.num_latent

    def codes(self, parameters: RealArray) -> RealArray:
        """Give the codes, (n_codes, num_latent)."""
        return parameters[len(self.pixel_cells) :].reshape(self.num_codes, -1)

    def log10_rho(self, parameters: RealArray) -> RealArray:
        """Give log10 rho of the cells, mesh.ground_shape."""
        section = np.full(self.mesh.is_ground.size, self.fixed_log10_rho)
        section[self.pixel_cells] = parameters[: len(self.pixel_cells)]
        decoded = self.network.decode(self.codes(parameters))
        section[self.code_cells] = decoded.reshape(self.num_codes, -1)
        return section.reshape(self.mesh.ground_shape)

    def slope(self, parameters: RealArray) -> Any:
        """Give d log10 rho / d parameters, sparse (n_cells, n_parameters)."""
        num_pixels = len(self.pixel_cells)
        jacobian = self.network.jacobian(self.codes(parameters))
        latent = jacobian.shape[2]
        rows = np.repeat(self.code_cells.ravel(), latent)
        own = np.arange(self.num_codes * latent).reshape(self.num_codes, 1, latent)
        columns = num_pixels + np.broadcast_to(own, jacobian.shape).ravel()
        return sparse.csr_array(
            (
                np.concatenate([np.ones(num_pixels), jacobian.ravel()]),
                (
                    np.concatenate([self.pixel_cells, rows]),
                    np.concatenate([np.arange(num_pixels), columns]),
                ),
            ),
            shape=(self.mesh.is_ground.size, self.num_parameters),
        )

    def encode(self, log10_rho: RealArray) -> RealArray:
        """Give parameters near a section: pixels as they are, codes by the encoder's mean."""
        flat = log10_rho.ravel()
        sections = flat[self.code_cells].reshape(self.num_codes, *self.network.grid.shape)
        return np.concatenate([flat[self.pixel_cells], self.network.encode(sections).ravel()])
