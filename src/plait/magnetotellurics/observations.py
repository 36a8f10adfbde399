"""The data of a 2-D inversion: one real number per row, with frequency, receiver and component.

Readers of ModEM, Occam2D and MT2DData files and profile.py make it; misfit.py and inversion.py
take it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

from plait.errors import SurveyError
from plait.magnetotellurics.arrays import BoolArray, IndexArray, RealArray
from plait.magnetotellurics.survey import MU_0


class Component(IntEnum):
    """What a datum is: log10 of ohm m, radians of the first quadrant, ohm, or a tipper.

    The TM phase is that of -Zyx, so that it lies in the first quadrant like the TE phase; real and
    imaginary parts are those of Zxy and Zyx themselves.
    """

    TE_LOG10_RHO = 0
    TE_PHASE = 1
    TE_REAL = 2
    TE_IMAG = 3
    TM_LOG10_RHO = 4
    TM_PHASE = 5
    TM_REAL = 6
    TM_IMAG = 7
    TIPPER_REAL = 8
    TIPPER_IMAG = 9


@dataclass(frozen=True, kw_only=True)
class Observations:
    """Measured numbers on a profile.

    Attributes:
        frequency_hz: (n_freq,), the distinct frequencies.
        position_m: (n_rx,), receivers along the profile.
        receiver_names: n_rx names.
        frequency_index, receiver_index, component: (n_data,) integers.
        value, error: (n_data,); error is a standard deviation in the unit of the component.
        notes: what was dropped or changed on the way.
    """

    frequency_hz: RealArray
    position_m: RealArray
    receiver_names: tuple[str, ...]
    frequency_index: IndexArray
    receiver_index: IndexArray
    component: IndexArray
    value: RealArray
    error: RealArray
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {
            len(column)
            for column in (
                self.frequency_index,
                self.receiver_index,
                self.component,
                self.value,
                self.error,
            )
        }
        if len(sizes) != 1 or sizes == {0}:
            raise SurveyError(f"the columns of the observations have lengths {sorted(sizes)}")
        if not (np.isfinite(self.value).all() and np.isfinite(self.error).all()):
            raise SurveyError("observations and their errors must be finite; mask the others first")
        if not (self.error > 0).all():
            raise SurveyError("errors must be positive; use with_error_floor or mask these rows")

    @property
    def num_data(self) -> int:
        """How many rows there are."""
        return len(self.value)


def masked(observations: Observations, keep: BoolArray, *, why: str) -> Observations:
    """Keep the rows marked by the boolean keep, (n_data,), and note the reason for the others."""
    dropped = int((~keep).sum())
    note = f"{dropped} of {len(keep)} data dropped: {why}"
    return replace(
        observations,
        frequency_index=observations.frequency_index[keep],
        receiver_index=observations.receiver_index[keep],
        component=observations.component[keep],
        value=observations.value[keep],
        error=observations.error[keep],
        notes=(*observations.notes, note) if dropped else observations.notes,
    )


def selected(observations: Observations, components: Sequence[Component]) -> Observations:
    """Keep some components, for a TE, TM, tipper or joint inversion."""
    names = ", ".join(component.name for component in components)
    keep = np.isin(observations.component, components)
    return masked(observations, keep, why=f"only {names} asked for")


def with_error_floor(
    observations: Observations, *, log10_rho: float, phase_rad: float
) -> Observations:
    """Raise the errors of log10 rho and phase data to at least these values."""
    kind = observations.component % 4
    is_transfer = observations.component < Component.TIPPER_REAL
    floor = np.where(is_transfer & (kind == 0), log10_rho, 0.0)
    floor = np.where(is_transfer & (kind == 1), phase_rad, floor)
    raised = int((observations.error < floor).sum())
    return replace(
        observations,
        error=np.maximum(observations.error, floor),
        notes=(*observations.notes, f"the error floor raised {raised} errors"),
    )


def as_log_data(observations: Observations) -> Observations:
    """Turn pairs of real and imaginary parts into log10 rho and phase, errors to first order.

    For |dZ| / |Z| = e with independent parts, log10 rho gets 2 e / ln 10 and the phase e, where e
    is the root mean square of the two parts' errors over |Z|. A part without its partner is
    dropped and noted.
    """
    rows: dict[str, list[float]] = {"f": [], "r": [], "c": [], "v": [], "e": []}
    notes = []
    for real, rho, sign in (
        (Component.TE_REAL, Component.TE_LOG10_RHO, 1.0),
        (Component.TM_REAL, Component.TM_LOG10_RHO, -1.0),
    ):
        parts = {
            part: {
                (int(f), int(r)): (v, e)
                for f, r, c, v, e in zip(
                    observations.frequency_index,
                    observations.receiver_index,
                    observations.component,
                    observations.value,
                    observations.error,
                    strict=True,
                )
                if c == real + part
            }
            for part in (0, 1)
        }
        both = sorted(parts[0].keys() & parts[1].keys())
        alone = len(parts[0]) + len(parts[1]) - 2 * len(both)
        if alone:
            notes.append(f"{alone} {real.name[:2]} parts without their partner dropped")
        for f, r in both:
            z = sign * complex(parts[0][f, r][0], parts[1][f, r][0])
            relative = np.hypot(parts[0][f, r][1], parts[1][f, r][1]) / np.sqrt(2) / abs(z)
            omega = 2 * np.pi * observations.frequency_hz[f]
            rows["f"] += [f, f]
            rows["r"] += [r, r]
            rows["c"] += [rho, rho + 1]
            rows["v"] += [np.log10(abs(z) ** 2 / (omega * MU_0)), np.angle(z)]
            rows["e"] += [2 * relative / np.log(10), relative]
    return replace(
        observations,
        frequency_index=np.array(rows["f"], dtype=int),
        receiver_index=np.array(rows["r"], dtype=int),
        component=np.array(rows["c"], dtype=int),
        value=np.array(rows["v"]),
        error=np.array(rows["e"]),
        notes=(*observations.notes, *notes),
    )
