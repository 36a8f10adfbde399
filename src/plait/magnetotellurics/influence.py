"""How much of a section came from its prior and not from the data.

Sections found under different priors fit the same data equally well. Where they differ by more than
the data's own uncertainty, it was the prior that chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from plait.magnetotellurics.arrays import BoolArray, RealArray
from plait.magnetotellurics.prior import Prior, Range

LEAST_DECADES = 0.1  # smaller differences are not worth a hatch
MOST_DECADES = 0.3  # a factor of two; where data say nothing, no deviation excuses more
DEVIATIONS = 2.0


@dataclass(frozen=True, kw_only=True)
class Influence:
    """Where a prior spoke.

    Attributes:
        moved: mesh.ground_shape, largest difference of log10 rho from any other section.
        allowed: mesh.ground_shape, what the data allow: two posterior deviations of the smooth
            section, but at least 0.1 and at most 0.3 decades.
    """

    moved: RealArray
    allowed: RealArray

    @property
    def from_prior(self) -> BoolArray:
        """Cells whose value moved by more than the data allow."""
        return self.moved > self.allowed


def influence_of(
    log10_rho: RealArray, *, others: Sequence[RealArray], deviation: RealArray
) -> Influence:
    """Compare a section with others of the same misfit.

    Args:
        log10_rho: mesh.ground_shape, found with the prior.
        others: sections found without it or with another one, at the same misfit.
        deviation: mesh.ground_shape, of the smooth section's linearized posterior.
    """
    moved = np.max([np.abs(log10_rho - other) for other in others], axis=0)
    allowed = np.clip(DEVIATIONS * deviation, LEAST_DECADES, MOST_DECADES)
    return Influence(moved=moved, allowed=allowed)


def deliberately_different(prior: Prior) -> Prior:
    """Make a prior that contradicts another one: its finite layers are thicker than it allows.

    A thickness range [low, high] becomes [high, 2 high - low + high / 2]; all else stays, so that
    what moves, moves by the thickness.
    """
    layers = []
    for layer in prior.layers:
        if layer.thickness_m is None:
            layers.append(layer)
            continue
        low, high = layer.thickness_m.low, layer.thickness_m.high
        thicker = Range(high, 2.5 * high - low)
        layers.append(replace(layer, thickness_m=thicker))
    return replace(prior, name=f"{prior.name}, made thicker", layers=tuple(layers))
