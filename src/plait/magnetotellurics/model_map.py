"""From a vector of parameters to log10 resistivity of cells: pixels, bricks, fixed cells."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.arrays import IndexArray, RealArray
from plait.magnetotellurics.earth import Mesh
from plait.magnetotellurics.linear_solver import sparse


class SectionMap(Protocol):
    """A way to describe a section by parameters: pixels, bricks, or codes of a learnt prior."""

    @property
    def num_parameters(self) -> int:
        """Length of the vector of parameters."""
        ...

    def log10_rho(self, parameters: RealArray) -> RealArray:
        """Give log10 rho of the cells, mesh.ground_shape."""
        ...

    def slope(self, parameters: RealArray) -> Any:
        """Give d log10 rho / d parameters, sparse (n_cells, n_parameters)."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelMap:
    """Which parameter each ground cell takes.

    Attributes:
        parameter_of_cell: mesh.ground_shape, numbers from 0; -1 for a fixed cell.
        fixed_log10_rho: mesh.ground_shape, used where the parameter is -1.
    """

    parameter_of_cell: IndexArray
    fixed_log10_rho: RealArray

    def __post_init__(self) -> None:
        used = np.unique(self.parameter_of_cell[self.parameter_of_cell >= 0])
        if not np.array_equal(used, np.arange(len(used))) or len(used) == 0:
            raise InversionError("parameters must be numbered 0, 1, 2 ... without gaps")

    @property
    def num_parameters(self) -> int:
        """How many parameters there are."""
        return int(self.parameter_of_cell.max()) + 1

    def log10_rho(self, parameters: RealArray) -> RealArray:
        """Spread parameters over the cells, mesh.ground_shape."""
        free = self.parameter_of_cell >= 0
        return np.where(free, parameters[self.parameter_of_cell], self.fixed_log10_rho)

    def slope(self, parameters: RealArray) -> Any:
        """Give d log10 rho / d parameters, sparse (n_cells, n_parameters), the same everywhere."""
        del parameters
        cells = np.flatnonzero(self.parameter_of_cell.ravel() >= 0)
        columns = self.parameter_of_cell.ravel()[cells]
        shape = (self.parameter_of_cell.size, self.num_parameters)
        return sparse.csr_array((np.ones(len(cells)), (cells, columns)), shape=shape)


def pixel_map(mesh: Mesh, *, fixed_log10_rho: float = 2.0) -> ModelMap:
    """Give every ground cell its own parameter; terrain air gets fixed_log10_rho and no say."""
    index = np.full(mesh.ground_shape, -1)
    index[mesh.is_ground] = np.arange(int(mesh.is_ground.sum()))
    return ModelMap(
        parameter_of_cell=index, fixed_log10_rho=np.full(mesh.ground_shape, fixed_log10_rho)
    )


def brick_map(brick: IndexArray) -> ModelMap:
    """Give the cells of each brick one parameter, as an Occam2D model file says."""
    return ModelMap(parameter_of_cell=brick, fixed_log10_rho=np.zeros(brick.shape))
