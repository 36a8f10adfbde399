"""Draw sections from a Prior: columns of log10 resistivity, alone or side by side."""

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.prior import Bumps, Layer, Prior, Range

_NUM_WAVES = 6  # cosines that make up one wandering quantity
_NUM_PARTS = 8  # of a cell, so that layers that meet inside it do not blur each other
_MAX_NUMBERS = 4_000_000  # held at once, 32 MB


def draw_sections(
    prior: Prior, *, z_m: RealArray, y_m: RealArray, count: int, seed: int
) -> RealArray:
    """Draw sections of log10 rho.

    A cell that an interface cuts takes the mean of log10 rho over its thickness, so that a section
    changes continuously as an interface moves.

    Args:
        prior: what to draw.
        z_m: (n_z + 1,) node depths from the surface, increasing, the first at least 0.
        y_m: (n_y,) centres of the columns; one column is drawn without lateral variation.
        count: how many sections.
        seed: of this draw; the prior's own seed is not used here.

    Returns:
        (count, n_z, n_y).

    Raises:
        InversionError: depths that do not increase, a count under 1.
    """
    if count < 1 or len(z_m) < 2 or z_m[0] < 0 or (np.diff(z_m) <= 0).any():
        raise InversionError("need count >= 1 and increasing depths from 0 down")
    generator = np.random.default_rng([seed, len(y_m)])
    most = max(1, _MAX_NUMBERS // (_NUM_PARTS * (len(z_m) - 1) * len(y_m)))
    sizes = [min(most, count - begun) for begun in range(0, count, most)]
    return np.concatenate([_draw(prior, z_m, y_m, size, generator) for size in sizes])


def _draw(
    prior: Prior, z_m: RealArray, y_m: RealArray, count: int, generator: np.random.Generator
) -> RealArray:
    shape = (count, len(y_m))
    shares = np.arange(_NUM_PARTS) / _NUM_PARTS
    parts_m = np.append((z_m[:-1, None] + shares * np.diff(z_m)[:, None]).ravel(), z_m[-1])
    wander = _Wander(prior, y_m, count, generator)
    section = np.broadcast_to(
        wander.draw(prior.background_log10_rho)[:, None], (count, len(parts_m) - 1, len(y_m))
    ).copy()
    base = np.zeros(shape)
    for layer in prior.layers:
        top = base if layer.top_m is None else wander.draw(layer.top_m)
        there = generator.random(count)[:, None] < layer.probability
        if layer.thickness_m is None:
            base = np.where(there, np.inf, top)
        else:
            base = top + there * wander.draw(layer.thickness_m)
        _paint(section, parts_m, top, base, layer, wander, generator)
    section = section.reshape(count, len(z_m) - 1, _NUM_PARTS, len(y_m)).mean(2)
    _add_bumps(section, z_m, prior.bumps, generator)
    return section


class _Wander:
    """Draws quantities that wander along the profile within their ranges."""

    def __init__(
        self, prior: Prior, y_m: RealArray, count: int, generator: np.random.Generator
    ) -> None:
        self._shape = (count, len(y_m))
        self._share = prior.lateral_share if len(y_m) > 1 else 0.0
        self._place = (y_m - y_m[0]) / prior.correlation_m
        self._generator = generator

    def draw(self, range_: Range) -> RealArray:
        """Draw (count, n_y) numbers in a range."""
        count = self._shape[0]
        middle = self._generator.uniform(range_.low, range_.high, (count, 1))
        if self._share == 0:
            return np.broadcast_to(middle, self._shape).copy()
        size = self._share * (range_.high - range_.low) / 2
        rate = self._generator.standard_normal((count, _NUM_WAVES, 1))
        phase = self._generator.uniform(0, 2 * np.pi, (count, _NUM_WAVES, 1))
        # Random cosines with Gaussian rates have a Gaussian correlation [Rahimi, Recht 2007].
        waves = np.cos(rate * self._place + phase).sum(axis=1) * np.sqrt(2 / _NUM_WAVES)
        return np.clip(middle + size * waves, range_.low, range_.high)


def _share_of_cells(z_m: RealArray, top: RealArray, base: RealArray) -> RealArray:
    """Give the share of each cell between top and base, (count, n_z, n_y)."""
    upper, lower = z_m[:-1, None], z_m[1:, None]
    overlap = np.minimum(base[:, None], lower) - np.maximum(top[:, None], upper)
    return np.maximum(overlap, 0.0) / (lower - upper)


def _paint(
    section: RealArray,
    z_m: RealArray,
    top: RealArray,
    base: RealArray,
    layer: Layer,
    wander: _Wander,
    generator: np.random.Generator,
) -> None:
    value = wander.draw(layer.log10_rho)
    if layer.log10_rho_base is None:
        share = _share_of_cells(z_m, top, base)
        section += share * (value[:, None] - section)
        return
    # Sorted steps: interfaces and values are sorted shares of the way from top to base.
    deepest = np.minimum(base, z_m[-1])
    count = section.shape[0]
    places = np.sort(generator.random((count, layer.num_steps)), axis=1)
    shares = np.sort(generator.random((count, layer.num_steps + 1)), axis=1)
    end = wander.draw(layer.log10_rho_base)
    # From the lowest step up, each from the top, so that only neighbours share a cut part.
    for step in range(layer.num_steps, -1, -1):
        last = step == layer.num_steps
        lower = base if last else top + places[:, step, None] * (deepest - top)
        level = value + shares[:, step, None] * (end - value)
        share = _share_of_cells(z_m, top, lower)
        section += share * (level[:, None] - section)


def _add_bumps(
    section: RealArray, z_m: RealArray, bumps: Bumps, generator: np.random.Generator
) -> None:
    if bumps.max_count == 0:
        return
    count = len(section)
    centre_z = (z_m[1:] + z_m[:-1]) / 2
    number = generator.integers(0, bumps.max_count + 1, count)
    for bump in range(bumps.max_count):
        row = generator.integers(0, len(centre_z), count)
        middle = centre_z[row][:, None]
        height = middle * generator.uniform(
            bumps.height_share.low, bumps.height_share.high, (count, 1)
        )
        size = generator.uniform(-bumps.amplitude, bumps.amplitude, (count, 1))
        shape = size * np.exp(-(((centre_z - middle) / (height / 2)) ** 2) / 2)
        section += np.where(number[:, None] > bump, shape, 0.0)[:, :, None]
