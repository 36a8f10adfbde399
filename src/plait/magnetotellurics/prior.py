"""What is known before the data: layers with ranges, written in a small TOML file.

A Prior is data: ranges, layers, a seed. prior_sampler.py draws sections from it, prior_network.py
learns them. prior_file.py reads and writes it.
"""

from dataclasses import dataclass

from plait.errors import InversionError

_LOG10_RHO = (-3.0, 7.0)  # no ground is outside


@dataclass(frozen=True)
class Range:
    """A number of which the limits are known; every value between them is as likely."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise InversionError(f"a range needs low <= high, not [{self.low}, {self.high}]")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer that is painted over what was drawn before it.

    Attributes:
        name: for people.
        log10_rho: of ohm m.
        top_m: depth of its top; None puts it on the base of the layer before it.
        thickness_m: None lets it go down for ever.
        log10_rho_base: with num_steps, the value at its base.
        num_steps: interfaces inside the layer at random depths, between which log10 rho goes in
            sorted steps from log10_rho to log10_rho_base; 0 for a uniform layer.
        probability: of being there at all; an absent layer has no thickness.
    """

    name: str
    log10_rho: Range
    top_m: Range | None = None
    thickness_m: Range | None = None
    log10_rho_base: Range | None = None
    num_steps: int = 0
    probability: float = 1.0

    def __post_init__(self) -> None:
        where = f"layer {self.name!r}"
        if not 0 < self.probability <= 1:
            raise InversionError(f"{where}: probability={self.probability} must be over 0, up to 1")
        for range_ in (self.top_m, self.thickness_m):
            if range_ is not None and range_.low < 0:
                raise InversionError(f"{where}: depths and thicknesses must not be negative")
        if not 0 <= self.num_steps <= 100:
            raise InversionError(f"{where}: num_steps={self.num_steps} must be 0 to 100")
        if (self.num_steps > 0) != (self.log10_rho_base is not None):
            raise InversionError(f"{where}: give num_steps and log10_rho_base together, or neither")
        _check_log10_rho(where, self.log10_rho)
        if self.log10_rho_base is not None:
            _check_log10_rho(where, self.log10_rho_base)


@dataclass(frozen=True, kw_only=True)
class Bumps:
    """Smooth deviations that no layer describes, so that the network learns some tolerance.

    Attributes:
        max_count: from 0 to this many in a column.
        amplitude: largest deviation of log10 rho, of either sign.
        height_share: (low, high), height of a bump (two standard deviations) over its depth.
    """

    max_count: int = 0
    amplitude: float = 0.2
    height_share: Range = Range(0.2, 0.6)

    def __post_init__(self) -> None:
        if not 0 <= self.max_count <= 50 or self.amplitude < 0 or self.height_share.low <= 0:
            raise InversionError("bumps: max_count 0 to 50, amplitude >= 0, height_share > 0")


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Knowledge of an area, to be learnt by a network.

    Attributes:
        name: for people.
        background_log10_rho: of the ground before any layer is painted.
        layers: from the first painted to the last.
        bumps: tolerance.
        lateral_share: how far each quantity of a layer wanders along the profile, as a share of
            its range; of no effect on single columns.
        correlation_m: over which distance it wanders.
        seed: of the sampler and of the network's training.
    """

    name: str
    background_log10_rho: Range
    layers: tuple[Layer, ...]
    bumps: Bumps = Bumps()
    lateral_share: float = 0.2
    correlation_m: float = 1e4
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.layers:
            raise InversionError(f"prior {self.name!r} has no layer; it would teach nothing")
        if len(self.layers) > 50:
            raise InversionError(f"prior {self.name!r} has {len(self.layers)} layers; at most 50")
        if self.layers[0].top_m is None:
            raise InversionError(f"layer {self.layers[0].name!r} is the first one and needs top_m")
        if self.correlation_m <= 0 or not 0 <= self.lateral_share <= 1:
            raise InversionError("need correlation_m > 0 and lateral_share from 0 to 1")
        _check_log10_rho("the background", self.background_log10_rho)

    def reach_m(self) -> float:
        """Give the deepest place of any interface, in metres."""
        base = deepest = 0.0
        for layer in self.layers:
            top = base if layer.top_m is None else layer.top_m.high
            base = top + (0.0 if layer.thickness_m is None else layer.thickness_m.high)
            deepest = max(deepest, base)
        return deepest


def _check_log10_rho(where: str, range_: Range) -> None:
    if range_.low < _LOG10_RHO[0] or range_.high > _LOG10_RHO[1]:
        raise InversionError(
            f"{where}: log10 rho [{range_.low}, {range_.high}] lies outside {_LOG10_RHO}; "
            "it is the logarithm of ohm m"
        )
