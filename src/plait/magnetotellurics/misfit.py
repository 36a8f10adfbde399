"""Residuals in units of their errors, and their root mean square."""

from dataclasses import dataclass

import numpy as np

from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.observations import Component, Observations


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """Least-squares misfit of one set of observations."""

    observations: Observations

    def residual(self, values: RealArray) -> RealArray:
        """Give (observed - predicted) / error, (n_data,); phases differ by at most half a turn."""
        difference = self.observations.value - values
        is_phase = np.isin(self.observations.component, (Component.TE_PHASE, Component.TM_PHASE))
        turned = (difference + np.pi) % (2 * np.pi) - np.pi
        return np.where(is_phase, turned, difference) / self.observations.error

    def rms(self, values: RealArray) -> float:
        """Give sqrt(mean(residual^2)): 1 where the fit is as good as the errors."""
        return float(np.sqrt(np.mean(self.residual(values) ** 2)))

    def whitened(self, jacobian: RealArray) -> RealArray:
        """Divide the rows of a Jacobian by the errors."""
        return jacobian / self.observations.error[:, None]
