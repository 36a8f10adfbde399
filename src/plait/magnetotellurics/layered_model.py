"""Data of the section under each receiver as if it were layered: a cheap first guess.

The same maps, penalties and steps that serve the 2-D problem serve this one, so that a start made
of stitched columns needs no 2-D solve.
"""

from dataclasses import dataclass

import numpy as np

from plait.magnetotellurics.arrays import ComplexArray, RealArray
from plait.magnetotellurics.forward_2d import Problem
from plait.magnetotellurics.jacobian import DenseSensitivity
from plait.magnetotellurics.model_map import SectionMap
from plait.magnetotellurics.observations import Observations
from plait.magnetotellurics.prediction import predict_rows
from plait.magnetotellurics.survey import MU_0

_LN10 = float(np.log(10.0))


@dataclass(frozen=True, kw_only=True)
class LayeredModel:
    """A DataModel that takes the column of cells under each receiver for a layered earth.

    TE and TM predictions are equal and tippers zero.
    """

    problem: Problem
    observations: Observations
    model_map: SectionMap

    @property
    def num_parameters(self) -> int:
        """Length of the vector of parameters."""
        return self.model_map.num_parameters

    def predict(self, parameters: RealArray) -> RealArray:
        """Give the predicted data, (n_data,)."""
        impedance, _ = self._columns(self.model_map.log10_rho(parameters))
        return self._rows(impedance)[0]

    def linearize(self, parameters: RealArray) -> DenseSensitivity:
        """Give the predicted data and their Jacobian by the parameters."""
        impedance, slope = self._columns(self.model_map.log10_rho(parameters))
        values, by_log = self._rows(impedance)
        f, r = self.observations.frequency_index, self.observations.receiver_index
        # d ln Z / d log10 rho of the cells under the receiver of each datum, (n_data, n_rows).
        under = np.real(by_log[:, None] * (slope / impedance[..., None])[f, r])
        num_rows, num_columns = self.problem.mesh.ground_shape
        full = np.zeros((len(values), num_rows, num_columns))
        column = self.problem.receivers.column[r]
        full[np.arange(len(values)), :, column] = under
        by_parameters = self.model_map.slope(parameters)
        jacobian = np.asarray((by_parameters.T @ full.reshape(len(values), -1).T).T)
        return DenseSensitivity(values=values, jacobian=jacobian)

    def _rows(self, impedance: ComplexArray) -> tuple[RealArray, ComplexArray]:
        observations = self.observations
        values = np.empty(observations.num_data)
        slopes = np.empty(observations.num_data, dtype=np.complex128)
        is_tm = (observations.component >= 4) & (observations.component <= 7)
        for f, frequency in enumerate(observations.frequency_hz):
            rows = np.flatnonzero(observations.frequency_index == f)
            z = impedance[f, observations.receiver_index[rows]]
            values[rows], slopes[rows] = predict_rows(
                observations.component[rows],
                impedance=np.where(is_tm[rows], -z, z),
                tipper=np.zeros(len(rows), dtype=np.complex128),
                frequency_hz=float(frequency),
            )
        slopes[observations.component >= 8] = 0
        return values, slopes

    def _columns(self, log10_rho: RealArray) -> tuple[ComplexArray, ComplexArray]:
        """Give Z (n_freq, n_rx) at the surface and dZ / d log10 rho (n_freq, n_rx, n_rows)."""
        column = self.problem.receivers.column
        return column_impedances(
            log10_rho[:, column],
            thickness_m=self.problem.mesh.ground_thickness_m,
            is_ground=self.problem.mesh.is_ground[:, column],
            frequency_hz=self.problem.frequency_hz,
        )


def column_impedances(
    log10_rho: RealArray,
    *,
    thickness_m: RealArray,
    is_ground: np.ndarray,
    frequency_hz: RealArray,
) -> tuple[ComplexArray, ComplexArray]:
    """Compute impedances of columns and their derivatives by the recursion of Wait [1954].

    Args:
        log10_rho: (n_rows, n_columns); the last row goes on for ever.
        thickness_m: (n_rows,).
        is_ground: (n_rows, n_columns); air of the terrain is passed over.
        frequency_hz: (n_freq,).

    Returns:
        Z (n_freq, n_columns) in ohm and dZ / d log10 rho (n_freq, n_columns, n_rows).
    """
    induction = 2j * np.pi * MU_0 * np.asarray(frequency_hz)[:, None]
    num_rows = len(log10_rho)
    wave = [np.sqrt(induction * 10.0 ** -log10_rho[j]) for j in range(num_rows)]
    z = induction / wave[-1]
    through: list[ComplexArray] = []
    own: list[ComplexArray] = [z * _LN10 / 2]
    for j in range(num_rows - 2, -1, -1):
        k, h = wave[j], thickness_m[j]
        c, t = induction / k, np.tanh(k * h)
        bottom = c + z * t
        by_z = c**2 * (1 - t**2) / bottom**2
        by_t = c * (c**2 - z**2) / bottom**2
        by_c = (z + c * t) / bottom + c * (t * bottom - z - c * t) / bottom**2
        direct = _LN10 / 2 * (by_c * c - by_t * (1 - t**2) * k * h)
        ground = is_ground[j]
        through.append(np.where(ground, by_z, 1.0))
        own.append(np.where(ground, direct, 0.0))
        z = np.where(ground, c * (z + c * t) / bottom, z)
    slope = np.empty((*z.shape, num_rows), dtype=np.complex128)
    passed = np.ones_like(z)
    for j in range(num_rows):
        slope[..., j] = passed * own[num_rows - 1 - j]
        if j < num_rows - 1:
            passed = passed * through[num_rows - 2 - j]
    return z, slope
