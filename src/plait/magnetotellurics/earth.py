"""The mesh of a 2-D section.

Rows run down from the top of the air, columns along the profile. The ground begins in each column
at its terrain row; a flat surface has the same row everywhere.
"""

from dataclasses import dataclass

import numpy as np

from plait.errors import EarthError
from plait.magnetotellurics.arrays import BoolArray, IndexArray, RealArray

AIR_OHM_M = 1e12  # so high that the air carries no current at any period of the method


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Cells of a section.

    Attributes:
        y_m: (n_y + 1,) node coordinates along the profile, increasing.
        z_m: (n_z + 1,) node depths, increasing; the first num_air rows are air everywhere.
        num_air: rows of pure air.
        terrain_row: (n_y,) first ground row of each column, at least num_air.
    """

    y_m: RealArray
    z_m: RealArray
    num_air: int
    terrain_row: IndexArray

    def __post_init__(self) -> None:
        if (np.diff(self.y_m) <= 0).any() or (np.diff(self.z_m) <= 0).any():
            raise EarthError("node coordinates must increase")
        if not 1 <= self.num_air <= len(self.z_m) - 3:
            raise EarthError(f"num_air={self.num_air}: at least 1 row of air, 2 rows of ground")
        if self.terrain_row.shape != (len(self.y_m) - 1,):
            raise EarthError("terrain_row needs one row for each column")
        if not ((self.terrain_row >= self.num_air) & (self.terrain_row < len(self.z_m) - 2)).all():
            raise EarthError("terrain rows must lie below the pure air and above the last two rows")

    @property
    def width_m(self) -> RealArray:
        """Column widths, (n_y,)."""
        return np.diff(self.y_m)

    @property
    def ground_thickness_m(self) -> RealArray:
        """Thicknesses of the rows that may hold ground, (n_ground,)."""
        return np.diff(self.z_m[self.num_air :])

    @property
    def ground_shape(self) -> tuple[int, int]:
        """Rows that may hold ground, and columns: the shape of a resistivity array."""
        return len(self.z_m) - 1 - self.num_air, len(self.y_m) - 1

    @property
    def is_ground(self) -> BoolArray:
        """Where a cell of the ground rows is ground and not terrain air, ground_shape."""
        rows = np.arange(self.ground_shape[0])[:, None]
        return rows >= (self.terrain_row - self.num_air)[None, :]


def flat_mesh(*, y_m: RealArray, ground_z_m: RealArray, air_height_m: float) -> Mesh:
    """Put rows of air over a flat ground, growing upwards by 1.5 from the first ground row.

    Args:
        y_m: (n_y + 1,) nodes.
        ground_z_m: (n_ground + 1,) node depths, the first one is the surface.
        air_height_m: at least this much air.
    """
    rows: list[float] = []
    step = ground_z_m[1] - ground_z_m[0]
    while sum(rows) < air_height_m:
        rows.append(step)
        step *= 1.5
    heights = np.cumsum(rows)[::-1]
    return Mesh(
        y_m=np.asarray(y_m, dtype=float),
        z_m=np.concatenate([ground_z_m[0] - heights, ground_z_m]),
        num_air=len(rows),
        terrain_row=np.full(len(y_m) - 1, len(rows)),
    )


def terrain_mesh(
    *, y_m: RealArray, z_m: RealArray, surface_z_m: RealArray, air_height_m: float
) -> Mesh:
    """Put a surface that rises and falls into rows, by cells, with air as in flat_mesh over it.

    Args:
        y_m: (n_y + 1,) nodes.
        z_m: (n_rows + 1,) node depths; the first one lies at or above the highest ground.
        surface_z_m: (n_y,) depth of the surface in each column (negative above z = 0); the ground
            begins at the nearest node.
        air_height_m: at least this much air over the first row.

    Raises:
        EarthError: a surface above the first row, or as deep as the last two rows.
    """
    surface = np.asarray(surface_z_m, dtype=float)
    if surface.min() < z_m[0] - (z_m[1] - z_m[0]) / 2:
        raise EarthError(f"the surface rises to z = {surface.min():g} m, the rows to {z_m[0]:g} m")
    flat = flat_mesh(y_m=y_m, ground_z_m=z_m, air_height_m=air_height_m)
    nearest = np.abs(surface[:, None] - np.asarray(z_m)[None, :]).argmin(axis=1)
    return Mesh(
        y_m=flat.y_m, z_m=flat.z_m, num_air=flat.num_air, terrain_row=flat.num_air + nearest
    )
