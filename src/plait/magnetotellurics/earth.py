"""The mesh of a 2-D section and how to build one from skin depths.

Rows run down from the top of the air, columns along the profile. The ground begins in each column
at its terrain row; a flat surface has the same row everywhere.
"""

from dataclasses import dataclass

import numpy as np

from plait.errors import EarthError
from plait.magnetotellurics.arrays import BoolArray, IndexArray, RealArray
from plait.magnetotellurics.forward_1d import skin_depth_m

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


@dataclass(frozen=True, kw_only=True)
class MeshDesign:
    """How to grade a mesh.

    Attributes:
        cells_per_skin_depth: first row's share of the smallest skin depth.
        growth: thickness ratio of rows, and of the columns outside the core.
        pad_growth: ratio of rows and columns beyond one skin depth of the core.
        num_pad_skin_depths: reach of the padding in skin depths of the lowest frequency.
        max_core_width_m: widest column among the stations; None: a quarter of their mean spacing.
    """

    cells_per_skin_depth: float = 10.0
    growth: float = 1.12
    pad_growth: float = 1.35
    num_pad_skin_depths: float = 4.0
    max_core_width_m: float | None = None

    def __post_init__(self) -> None:
        if self.cells_per_skin_depth < 2 or not 1 < self.growth <= self.pad_growth <= 2:
            raise EarthError("need cells_per_skin_depth >= 2 and 1 < growth <= pad_growth <= 2")


def mesh_from_skin_depths(
    position_m: RealArray,
    *,
    frequency_hz: RealArray,
    min_resistivity_ohm_m: float,
    max_resistivity_ohm_m: float,
    design: MeshDesign,
) -> Mesh:
    """Grade a flat mesh for stations and frequencies.

    The first row is a fraction of the smallest skin depth (highest frequency, lowest resistivity);
    rows grow down to the padding, which reaches several of the largest skin depths. Columns are
    even between stations and grow outwards.

    Raises:
        EarthError: resistivities that are not positive and in order.
    """
    if not 0 < min_resistivity_ohm_m <= max_resistivity_ohm_m:
        raise EarthError("need 0 < min_resistivity_ohm_m <= max_resistivity_ohm_m")
    smallest = skin_depth_m(min_resistivity_ohm_m, float(np.max(frequency_hz)))
    largest = skin_depth_m(max_resistivity_ohm_m, float(np.min(frequency_hz)))
    reach = design.num_pad_skin_depths * largest
    z = [0.0]
    step = smallest / design.cells_per_skin_depth
    while z[-1] < reach:
        z.append(z[-1] + step)
        step *= design.growth if z[-1] < largest else design.pad_growth
    y = _columns(np.sort(position_m), reach=reach, fallback=smallest, design=design)
    return flat_mesh(y_m=y, ground_z_m=np.array(z), air_height_m=reach)


def _columns(
    position: RealArray, *, reach: float, fallback: float, design: MeshDesign
) -> RealArray:
    """Even columns between neighbours, so that stations lie at column centres or on nodes."""
    spacing = np.diff(position)
    mean = float(np.mean(spacing)) if len(spacing) else fallback
    width = design.max_core_width_m or mean / 4
    left, right = position[0] - 2 * width, position[-1] + 2 * width
    core = np.linspace(left, right, int(np.ceil((right - left) / width)) + 1)
    pads: list[float] = []
    step, distance = width, 0.0
    while distance < reach:
        step *= design.pad_growth
        distance += step
        pads.append(distance)
    outer = np.array(pads)
    return np.concatenate([core[0] - outer[::-1], core, core[-1] + outer])
