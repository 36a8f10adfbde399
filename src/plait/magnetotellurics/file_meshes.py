"""Meshes of ModEM and Occam2D files, with air put over them."""

import numpy as np

from plait.magnetotellurics.earth import Mesh, flat_mesh
from plait.magnetotellurics.modem_model import ModemModel
from plait.magnetotellurics.occam2d_model import Occam2dMesh, Occam2dModel


def mesh_of_modem(model: ModemModel, *, air_height_m: float = 5e5) -> Mesh:
    """Give the mesh of a ModEM 2-D model; y = 0 is its left edge, as in ModEM's data files."""
    return flat_mesh(
        y_m=np.concatenate([[0.0], np.cumsum(model.width_m)]),
        ground_z_m=np.concatenate([[0.0], np.cumsum(model.thickness_m)]),
        air_height_m=air_height_m,
    )


def mesh_of_occam2d(sizes: Occam2dMesh, model: Occam2dModel, *, air_height_m: float = 2e5) -> Mesh:
    """Give the mesh of an Occam2D run in the coordinates of its data file.

    The binding offset is the coordinate of the right edge of the top left brick.
    """
    y = np.concatenate([[0.0], np.cumsum(sizes.width_m)])
    return flat_mesh(
        y_m=y - y[model.first_brick_columns] + model.binding_offset_m,
        ground_z_m=np.concatenate([[0.0], np.cumsum(sizes.thickness_m)]),
        air_height_m=air_height_m,
    )
