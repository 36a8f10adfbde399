"""Graded meshes from skin depths, stations, contacts and interfaces.

A wanted cell size is given at each place: small at the surface, at stations and at contacts, and
growing with the distance from them. Between fixed nodes the number of cells is the integral of
1 / size, and the nodes stand at equal parts of that integral, so that sizes change smoothly and
every fixed place is a node.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from plait.errors import EarthError
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.earth import Mesh, flat_mesh
from plait.magnetotellurics.forward_1d import skin_depth_m

_SAMPLES = 4000  # of the size function between two fixed nodes


@dataclass(frozen=True, kw_only=True)
class MeshDesign:
    """How to grade a mesh.

    Attributes:
        cells_per_skin_depth: sets the size at the surface and at contacts, as a share of the skin
            depth of the highest frequency in the most conductive ground.
        growth: how much wider a cell may be than its neighbour among the stations.
        pad_growth: the same below one skin depth of the lowest frequency, and outside the stations.
        num_pad_skin_depths: reach of the padding in skin depths of the lowest frequency.
        station_width_m: largest width at a station; None: a quarter of the mean spacing.
    """

    cells_per_skin_depth: float = 10.0
    growth: float = 1.12
    pad_growth: float = 1.35
    num_pad_skin_depths: float = 4.0
    station_width_m: float | None = None

    def __post_init__(self) -> None:
        if self.cells_per_skin_depth < 2 or not 1 < self.growth <= self.pad_growth <= 2:
            raise EarthError("need cells_per_skin_depth >= 2 and 1 < growth <= pad_growth <= 2")
        if self.num_pad_skin_depths < 2:
            raise EarthError("num_pad_skin_depths must be at least 2")


def mesh_from_skin_depths(
    position_m: RealArray,
    *,
    frequency_hz: RealArray,
    min_resistivity_ohm_m: float,
    max_resistivity_ohm_m: float,
    design: MeshDesign,
    contact_y_m: Sequence[float] = (),
    interface_z_m: Sequence[float] = (),
) -> Mesh:
    """Grade a flat mesh for stations, frequencies and, where they are known, boundaries.

    Args:
        position_m: (n_rx,) stations along the profile.
        frequency_hz: all frequencies.
        min_resistivity_ohm_m: of the ground, sets the smallest skin depth.
        max_resistivity_ohm_m: of the ground, sets the largest one.
        design: sizes and growth.
        contact_y_m: vertical boundaries; each becomes a column of nodes with fine cells beside it.
        interface_z_m: horizontal boundaries; the same for rows.

    Raises:
        EarthError: resistivities that are not positive and in order, interfaces above the ground.
    """
    if not 0 < min_resistivity_ohm_m <= max_resistivity_ohm_m:
        raise EarthError("need 0 < min_resistivity_ohm_m <= max_resistivity_ohm_m")
    if len(interface_z_m) and min(interface_z_m) <= 0:
        raise EarthError("interfaces must lie below the surface, z > 0")
    smallest = skin_depth_m(min_resistivity_ohm_m, float(np.max(frequency_hz)))
    largest = skin_depth_m(max_resistivity_ohm_m, float(np.min(frequency_hz)))
    reach = design.num_pad_skin_depths * largest
    fine = smallest / design.cells_per_skin_depth
    stations = np.sort(np.asarray(position_m, dtype=float))
    width = design.station_width_m or (
        float(np.mean(np.diff(stations))) / 4 if len(stations) > 1 else smallest
    )

    def row_size(z: RealArray) -> RealArray:
        size = _grown(z, [0.0, *interface_z_m], fine, design.growth)
        return np.maximum(size, _grown(z, [largest], 0.0, design.pad_growth) * (z > largest))

    def column_size(y: RealArray) -> RealArray:
        outside = np.maximum(np.maximum(stations[0] - y, y - stations[-1]), 0.0)
        size = np.minimum(width, _grown(y, contact_y_m, fine, design.growth))
        return size + (design.pad_growth - 1) * outside

    deepest = max([0.0, *interface_z_m])
    left, right = (function([*stations, *contact_y_m]) for function in (min, max))
    z = _graded([0.0, *sorted(interface_z_m), deepest + reach], row_size)
    y = _graded([left - reach, *sorted(contact_y_m), right + reach], column_size)
    return flat_mesh(y_m=y, ground_z_m=z, air_height_m=reach)


def _grown(place: RealArray, centres: Sequence[float], start: float, growth: float) -> RealArray:
    """Size that starts at each centre and grows with the distance to the nearest one."""
    if not len(centres):
        return np.full(place.shape, np.inf)
    distance = np.min(np.abs(place[:, None] - np.asarray(centres)[None, :]), axis=1)
    return start + (growth - 1) * distance


def _graded(fixed: Sequence[float], size: Callable[[RealArray], RealArray]) -> RealArray:
    """Place nodes so that cells have about the wanted size and every fixed place is a node."""
    nodes = [np.array([fixed[0]])]
    for start, end in pairwise(fixed):
        if end <= start:
            raise EarthError(f"boundaries at {start:g} and {end:g} m must differ")
        # Samples crowd at both ends, where sizes are small.
        share = (1 - np.cos(np.linspace(0, np.pi, _SAMPLES))) / 2
        place = start + (end - start) * share
        cells = np.concatenate(
            [[0.0], np.cumsum(np.diff(place) / size((place[1:] + place[:-1]) / 2))]
        )
        count = max(1, int(np.ceil(cells[-1])))
        inner = np.interp(np.arange(1, count) * cells[-1] / count, cells, place)
        nodes.append(np.append(inner, end))
    return np.concatenate(nodes)
