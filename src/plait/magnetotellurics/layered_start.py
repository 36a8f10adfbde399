"""Where a 2-D inversion begins: a half-space, or columns fitted as layered earths."""

from enum import Enum

from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.data_model import DataModel
from plait.magnetotellurics.inversion import Limit, StoppingRule, invert
from plait.magnetotellurics.misfit import Misfit
from plait.magnetotellurics.penalty import Penalty
from plait.magnetotellurics.step_rules import OccamRule


class Start(Enum):
    """The first model."""

    UNIFORM = "uniform"
    LAYERED = "layered"


def layered_start(
    layered: DataModel,
    *,
    misfit: Misfit,
    penalty: Penalty,
    start: RealArray,
    bounds: tuple[Limit, Limit],
) -> RealArray:
    """Fit the columns under the receivers as layered earths, joined by the penalty.

    A 2-D section is not fitted this way, so the search ends where it slows down. No 2-D problem is
    solved.

    Args:
        layered: LayeredModel of the same map as the 2-D inversion's.
        misfit: of the 2-D inversion.
        penalty: of the 2-D inversion.
        start: (n_parameters,) of a half-space.
        bounds: of the 2-D inversion.

    Returns:
        (n_parameters,).
    """
    result = invert(
        layered,
        misfit=misfit,
        penalty=penalty,
        start=start,
        rule=OccamRule(max_drop=30.0, max_trials=6),
        stopping=StoppingRule(target_rms=2.0, max_steps=6, min_relative_drop=0.1),
        bounds=bounds,
    )
    return result.parameters
