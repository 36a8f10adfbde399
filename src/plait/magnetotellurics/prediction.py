"""From impedances and tippers to the numbers of Observations, and the slopes between them."""

from dataclasses import dataclass

import numpy as np

from plait.errors import InversionError
from plait.magnetotellurics.arrays import ComplexArray, IndexArray, RealArray
from plait.magnetotellurics.forward_2d import Mode, Problem
from plait.magnetotellurics.observations import Component, Observations
from plait.magnetotellurics.survey import MU_0

_LN10 = float(np.log(10.0))


@dataclass(frozen=True, kw_only=True)
class Task:
    """The data rows of one mode at one frequency; one factorization serves them all."""

    mode: Mode
    frequency_index: int
    rows: IndexArray


def tasks_of(problem: Problem, observations: Observations) -> list[Task]:
    """List the solves that the observations need, most expensive mode first.

    Raises:
        InversionError: frequencies or receivers that are not those of the problem.
    """
    if not np.array_equal(problem.frequency_hz, observations.frequency_hz):
        raise InversionError("the problem was made for other frequencies than the observations'")
    if problem.receivers.num_receivers != len(observations.position_m):
        raise InversionError("the problem was made for other receivers than the observations'")
    is_tm = (observations.component >= Component.TM_LOG10_RHO) & (
        observations.component <= Component.TM_IMAG
    )
    tasks = []
    for mode, chosen in ((Mode.TE, ~is_tm), (Mode.TM, is_tm)):
        for f in range(len(observations.frequency_hz)):
            rows = np.flatnonzero(chosen & (observations.frequency_index == f))
            if len(rows):
                tasks.append(Task(mode=mode, frequency_index=f, rows=rows))
    return tasks


def predict_rows(
    component: IndexArray, *, impedance: ComplexArray, tipper: ComplexArray, frequency_hz: float
) -> tuple[RealArray, ComplexArray]:
    """Give the values of data rows and their slopes.

    Args:
        component: (n,) Component numbers of one mode.
        impedance: (n,) Zxy or Zyx at each row's receiver, in ohm.
        tipper: (n,).
        frequency_hz: of all rows.

    Returns:
        The values (n,), and c (n,) such that d value = Re(c d ln Z), for tipper rows Re(c d T).
    """
    omega = 2 * np.pi * frequency_hz
    is_tm = (component >= Component.TM_LOG10_RHO) & (component <= Component.TM_IMAG)
    kind = np.where(component >= Component.TIPPER_REAL, component - 4, component % 4)
    oriented = np.where(is_tm, -impedance, impedance)
    values = np.select(
        [kind == 0, kind == 1, kind == 2, kind == 3, kind == 4, kind == 5],
        [
            np.log10(np.abs(impedance) ** 2 / (omega * MU_0)),
            np.angle(oriented),
            impedance.real,
            impedance.imag,
            tipper.real,
            tipper.imag,
        ],
    )
    slopes = np.select(
        [kind == 0, kind == 1, kind == 2, kind == 3, kind == 4, kind == 5],
        [
            np.full(impedance.shape, 2 / _LN10 + 0j),
            np.full(impedance.shape, -1j),
            impedance,
            -1j * impedance,
            np.full(impedance.shape, 1 + 0j),
            np.full(impedance.shape, -1j),
        ],
    )
    return values, slopes
