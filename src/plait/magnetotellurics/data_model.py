"""What an inversion sees: parameters in, predicted data and their Jacobian out.

Parts compose: SectionModel turns a resistivity section into data, StaticShiftModel adds gains to
any other model.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from plait.magnetotellurics.arrays import IndexArray, RealArray
from plait.magnetotellurics.forward_2d import Problem
from plait.magnetotellurics.jacobian import DenseSensitivity, dense_sensitivity, predict
from plait.magnetotellurics.model_map import SectionMap
from plait.magnetotellurics.observations import Component, Observations


class DataModel(Protocol):
    """Predicts all data from one vector of parameters."""

    @property
    def num_parameters(self) -> int:
        """Length of the vector of parameters."""
        ...

    def predict(self, parameters: RealArray) -> RealArray:
        """Give the predicted data, (n_data,)."""
        ...

    def linearize(self, parameters: RealArray) -> DenseSensitivity:
        """Give the predicted data and their Jacobian by the parameters."""
        ...


@dataclass(frozen=True, kw_only=True)
class SectionModel:
    """Data of a 2-D section whose log10 resistivity comes from a SectionMap."""

    problem: Problem
    observations: Observations
    model_map: SectionMap
    num_workers: int = 1

    @property
    def num_parameters(self) -> int:
        """Length of the vector of parameters."""
        return self.model_map.num_parameters

    def predict(self, parameters: RealArray) -> RealArray:
        """Give the predicted data, (n_data,)."""
        rho = 10.0 ** self.model_map.log10_rho(parameters)
        return predict(self.problem, rho, self.observations, num_workers=self.num_workers)

    def linearize(self, parameters: RealArray) -> DenseSensitivity:
        """Give the predicted data and their Jacobian by the parameters."""
        rho = 10.0 ** self.model_map.log10_rho(parameters)
        full = dense_sensitivity(self.problem, rho, self.observations, num_workers=self.num_workers)
        jacobian = np.asarray((self.model_map.slope(parameters).T @ full.jacobian.T).T)
        return DenseSensitivity(values=full.values, jacobian=jacobian)


@dataclass(frozen=True, kw_only=True)
class StaticShiftModel:
    """Another model times one real gain per station and mode, the galvanic static shift.

    The last 2 n_rx parameters are log10 of the gain of apparent resistivity, TE first; phases and
    tippers do not change [Jones 1988, Geophysics 53, 967-978].
    """

    section: DataModel
    observations: Observations

    @property
    def num_parameters(self) -> int:
        """Length of the vector of parameters."""
        return self.section.num_parameters + 2 * len(self.observations.position_m)

    def predict(self, parameters: RealArray) -> RealArray:
        """Give the predicted data, (n_data,)."""
        split = self.section.num_parameters
        return self._shifted(self.section.predict(parameters[:split]), parameters[split:])

    def linearize(self, parameters: RealArray) -> DenseSensitivity:
        """Give the predicted data and their Jacobian by the parameters."""
        split = self.section.num_parameters
        inner = self.section.linearize(parameters[:split])
        values = self._shifted(inner.values, parameters[split:])
        kind, column = self._kind_and_column()
        # Gains multiply impedances by 10^(s / 2).
        scale = np.where(kind >= 2, 10.0 ** (parameters[split:][column] / 2), 1.0)
        shifts = np.zeros((len(values), self.num_parameters - split))
        slope = np.where(kind == 0, 1.0, np.where(kind >= 2, values * np.log(10) / 2, 0.0))
        shifts[np.arange(len(values)), column] = slope
        jacobian = np.concatenate([inner.jacobian * scale[:, None], shifts], axis=1)
        return DenseSensitivity(values=values, jacobian=jacobian)

    def _kind_and_column(self) -> tuple[IndexArray, IndexArray]:
        component = self.observations.component
        is_tipper = component >= Component.TIPPER_REAL
        kind = np.where(is_tipper, 1, component % 4)
        is_tm = (component >= Component.TM_LOG10_RHO) & ~is_tipper
        column = self.observations.receiver_index + is_tm * len(self.observations.position_m)
        return np.asarray(kind, dtype=np.int64), np.asarray(column, dtype=np.int64)

    def _shifted(self, values: RealArray, shifts: RealArray) -> RealArray:
        kind, column = self._kind_and_column()
        shift = shifts[column]
        scaled = np.where(kind >= 2, values * 10.0 ** (shift / 2), values)
        return np.where(kind == 0, values + shift, scaled)
