"""Residuals in units of their errors, and their root mean square."""

from dataclasses import dataclass

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.observations import Component, Observations


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """Misfit of one set of observations.

    Attributes:
        observations: values, errors, components.
        huber: None for least squares; a number c counts residuals over c errors by their size and
            not by their square [Huber 1964], so that a few bad data do not decide the section.
    """

    observations: Observations
    huber: float | None = None

    def __post_init__(self) -> None:
        if self.huber is not None and self.huber <= 0:
            raise InversionError(f"huber={self.huber} must be positive, or None")

    def residual(self, values: RealArray) -> RealArray:
        """Give (observed - predicted) / error, (n_data,); phases differ by at most half a turn."""
        difference = self.observations.value - values
        is_phase = np.isin(self.observations.component, (Component.TE_PHASE, Component.TM_PHASE))
        turned = (difference + np.pi) % (2 * np.pi) - np.pi
        return np.where(is_phase, turned, difference) / self.observations.error

    def rms(self, values: RealArray) -> float:
        """Give sqrt(mean(residual^2)): 1 where the fit is as good as the errors.

        With huber = c, residuals r over c count 2 c |r| - c^2 in the place of r^2.
        """
        size = np.abs(self.residual(values))
        limit = np.inf if self.huber is None else self.huber
        over = np.maximum(size - limit, 0.0)
        return float(np.sqrt(np.mean(size**2 - over**2)))

    def root_weight(self, values: RealArray) -> RealArray:
        """Give sqrt(min(1, c / |residual|)), (n_data,), to reweight a linearized problem."""
        if self.huber is None:
            return np.ones(self.observations.num_data)
        size = np.abs(self.residual(values))
        return np.sqrt(self.huber / np.maximum(size, self.huber))

    def whitened(self, jacobian: RealArray) -> RealArray:
        """Divide the rows of a Jacobian by the errors."""
        return jacobian / self.observations.error[:, None]
