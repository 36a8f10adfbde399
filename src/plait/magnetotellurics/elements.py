"""Vertical coefficients of a cell: how strongly its upper and lower nodes hold each other.

In a uniform column -a u'' + i w mu_0 b u = 0 has the exact solutions sinh and cosh of k z, with
k = sqrt(i w mu_0 b / a). FITTED writes the balance of a node with them, so that a layered
earth is solved exactly on any rows; PLAIN is their first term in k h, the classic second-order
scheme of ModEM and of most finite-difference codes, for comparison on equal meshes.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np

from plait.magnetotellurics.arrays import AnyArray, ComplexArray, RealArray


class Stencil(Enum):
    """Exponentially fitted or plain second-order rows."""

    FITTED = "fitted"
    PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class Elements:
    """Per unit width of a cell, (n_freq, n_z, n_y) each, or (n_z, n_y) as at() gives them.

    Attributes:
        edge: flux from the lower to the upper node per difference of u (a / h for k h -> 0).
        mass: what each of the two nodes keeps per u (i w mu_0 b h / 2 for k h -> 0).
        edge_change, mass_change: their derivatives by ln rho of the cell.
        lateral: (n_z, n_y) a, the coefficient along the profile.
        lateral_change: its derivative by ln rho (a for TM, 0 for TE).
        leak, leak_change: (n_freq, n_y) or (n_y,) sqrt(i w mu_0 a b) of the half-space
            under the last row.
    """

    edge: ComplexArray
    mass: ComplexArray
    edge_change: ComplexArray
    mass_change: ComplexArray
    lateral: RealArray
    lateral_change: RealArray
    leak: ComplexArray
    leak_change: ComplexArray

    def at(self, frequency: int) -> "Elements":
        """Give the coefficients at one frequency, by its index."""
        return Elements(
            edge=self.edge[frequency],
            mass=self.mass[frequency],
            edge_change=self.edge_change[frequency],
            mass_change=self.mass_change[frequency],
            lateral=self.lateral,
            lateral_change=self.lateral_change,
            leak=self.leak[frequency],
            leak_change=self.leak_change[frequency],
        )


def te_elements(
    sigma: RealArray, *, thickness_m: RealArray, induction: ComplexArray, stencil: Stencil
) -> Elements:
    """Make the coefficients for a = 1 and b = sigma, (n_z, n_y).

    thickness_m is (n_z,), induction i w mu_0 is (n_freq,).
    """
    h = thickness_m[:, None]
    one = np.ones_like(sigma)
    leak = np.sqrt(induction[:, None] * sigma[-1])
    induced = induction[:, None, None] * sigma
    if stencil is Stencil.PLAIN:
        edge, mass = _complex(np.broadcast_to(one / h, induced.shape)), induced * h / 2
        changes = (np.zeros_like(edge), -mass)
    else:
        x = _complex(np.sqrt(induced) * h)
        edge, mass, coth, inverse_sinh = _fitted(1 / h, x)
        changes = (-edge / 2 * (1 - coth), -mass / 2 * (1 + inverse_sinh))
    return Elements(
        edge=edge,
        mass=mass,
        edge_change=changes[0],
        mass_change=changes[1],
        lateral=one,
        lateral_change=np.zeros_like(one),
        leak=leak,
        leak_change=-leak / 2,
    )


def tm_elements(
    rho: RealArray, *, thickness_m: RealArray, induction: ComplexArray, stencil: Stencil
) -> Elements:
    """Make the coefficients for a = rho and b = 1, (n_z, n_y).

    thickness_m is (n_z,), induction i w mu_0 is (n_freq,).
    """
    h = thickness_m[:, None]
    leak = np.sqrt(induction[:, None] * rho[-1])
    shape = (len(induction), *rho.shape)
    if stencil is Stencil.PLAIN:
        edge = _complex(np.broadcast_to(rho / h, shape))
        mass = np.broadcast_to(induction[:, None, None] * h / 2, shape)
        changes = (edge, np.zeros_like(edge))
    else:
        x = _complex(np.sqrt(induction[:, None, None] / rho) * h)
        edge, mass, coth, inverse_sinh = _fitted(rho / h, x)
        changes = (edge / 2 * (1 + coth), mass / 2 * (1 - inverse_sinh))
    return Elements(
        edge=edge,
        mass=mass,
        edge_change=changes[0],
        mass_change=changes[1],
        lateral=rho,
        lateral_change=rho,
        leak=leak,
        leak_change=leak / 2,
    )


def _complex(values: AnyArray) -> ComplexArray:
    return np.asarray(values, dtype=np.complex128)


def _fitted(
    conductance: RealArray, x: ComplexArray
) -> tuple[ComplexArray, ComplexArray, ComplexArray, ComplexArray]:
    """Give g x / sinh x, g x tanh(x / 2), x coth x and x / sinh x without overflow, Re x > 0."""
    decay = np.exp(-x)
    one_less = -np.expm1(-2 * x)
    inverse_sinh = 2 * x * decay / one_less
    coth = x * (1 + decay**2) / one_less
    tanh_half = -np.expm1(-x) / (1 + decay)
    return conductance * inverse_sinh, conductance * x * tanh_half, coth, inverse_sinh
