"""The exact response of a layered earth: the oracle of the 2-D code and the start of inversions."""

import numpy as np

from plait.errors import EarthError
from plait.magnetotellurics.arrays import ComplexArray, RealArray
from plait.magnetotellurics.survey import MU_0


def layered_impedance(
    frequency_hz: RealArray, *, resistivity_ohm_m: RealArray, thickness_m: RealArray
) -> ComplexArray:
    """Give the surface impedance Zxy = Ex/Hy of horizontal layers; Zyx is its negative.

    Z_n = i w mu_0 / k_n in the half-space and upwards
    Z_j = c_j (Z_{j+1} + c_j tanh(k_j h_j)) / (c_j + Z_{j+1} tanh(k_j h_j)),
    with k = sqrt(i w mu_0 / rho) and c = i w mu_0 / k [Wait 1954; Ward and Hohmann 1988, eq. 3.38].

    Args:
        frequency_hz: (n_freq,).
        resistivity_ohm_m: (n_layers,), the last one the half-space.
        thickness_m: (n_layers - 1,).

    Returns:
        (n_freq,) complex, in ohm; phase +45 degrees over a half-space.

    Raises:
        EarthError: sizes that do not fit, values that are not positive.
    """
    if len(thickness_m) != len(resistivity_ohm_m) - 1:
        raise EarthError(
            f"{len(resistivity_ohm_m)} layers need {len(resistivity_ohm_m) - 1} thicknesses, "
            f"given {len(thickness_m)}"
        )
    if min(*resistivity_ohm_m, *thickness_m, *frequency_hz) <= 0:
        raise EarthError("frequencies, resistivities and thicknesses must be positive")
    induction = 2j * np.pi * np.asarray(frequency_hz) * MU_0
    impedance = np.sqrt(induction * resistivity_ohm_m[-1])
    for resistivity, thickness in zip(resistivity_ohm_m[-2::-1], thickness_m[::-1], strict=True):
        intrinsic = np.sqrt(induction * resistivity)
        tanh = np.tanh(induction / intrinsic * thickness)
        impedance = intrinsic * (impedance + intrinsic * tanh) / (intrinsic + impedance * tanh)
    return impedance


def skin_depth_m(resistivity_ohm_m: float, frequency_hz: float) -> float:
    """Give sqrt(rho / (pi f mu_0)) in metres, about 503 sqrt(rho / f)."""
    return float(np.sqrt(resistivity_ohm_m / (np.pi * frequency_hz * MU_0)))
