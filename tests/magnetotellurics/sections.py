"""Sections that several tests use: a graded mesh around a block, and ModEM's BLOCK2."""

import numpy as np

from plait.magnetotellurics.file_meshes import mesh_of_modem
from plait.magnetotellurics.modem_model import read_modem_model
from plait.magnetotellurics.observations import Component


def padding(step, reach, growth=1.35):
    steps = [0.0]
    while steps[-1] < reach:
        step *= growth
        steps.append(steps[-1] + step)
    return np.array(steps[1:])


def padded(core, reach, growth=1.35):
    outer = padding(core[1] - core[0], reach, growth)
    return np.concatenate([core[0] - outer[::-1], core, core[-1] + outer])


def resistivity_of(mesh, function):
    """Evaluate a function of y and z at the centres of the ground cells."""
    z = mesh.z_m[mesh.num_air :]
    y_grid, z_grid = np.meshgrid((mesh.y_m[1:] + mesh.y_m[:-1]) / 2, (z[1:] + z[:-1]) / 2)
    return function(y_grid, z_grid)


def block2_mesh(folder):
    return mesh_of_modem(read_modem_model(folder / "m0.rho"))


def impedance_grid(observations, real):
    """Arrange one mode's impedances as (n_freq, n_rx)."""
    grid = np.full((len(observations.frequency_hz), len(observations.position_m)), np.nan + 0j)
    for part, factor in ((real, 1.0), (Component(real + 1), 1j)):
        rows = observations.component == part
        where = observations.frequency_index[rows], observations.receiver_index[rows]
        grid[where] = np.nan_to_num(grid[where]) + factor * observations.value[rows]
    return grid
