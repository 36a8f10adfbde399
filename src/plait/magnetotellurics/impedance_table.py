"""Gather impedance rows of a file into Observations; shared by the readers of 2-D data files."""

from dataclasses import dataclass, field

import numpy as np

from plait.magnetotellurics.observations import Component, Observations


@dataclass
class ImpedanceTable:
    """Rows collected one by one: period or frequency key, receiver key, component, value, error."""

    frequency_of: dict[float, int] = field(default_factory=dict)
    receiver_of: dict[str, int] = field(default_factory=dict)
    position_m: list[float] = field(default_factory=list)
    rows: list[tuple[int, int, int, float, float]] = field(default_factory=list)

    def add(
        self, *, frequency_hz: float, name: str, position_m: float, real: Component, value: complex,
        error: float,
    ) -> None:  # fmt: skip
        """Add the real and the imaginary part of one complex datum."""
        f = self.frequency_of.setdefault(frequency_hz, len(self.frequency_of))
        if name not in self.receiver_of:
            self.receiver_of[name] = len(self.receiver_of)
            self.position_m.append(position_m)
        r = self.receiver_of[name]
        self.rows.append((f, r, int(real), value.real, error))
        self.rows.append((f, r, int(real) + 1, value.imag, error))

    def observations(self, notes: tuple[str, ...]) -> Observations:
        """Give the collected rows as Observations, impedances in ohm."""
        columns = list(zip(*self.rows, strict=True))
        return Observations(
            frequency_hz=np.array(list(self.frequency_of)),
            position_m=np.array(self.position_m),
            receiver_names=tuple(self.receiver_of),
            frequency_index=np.array(columns[0], dtype=int),
            receiver_index=np.array(columns[1], dtype=int),
            component=np.array(columns[2], dtype=int),
            value=np.array(columns[3]),
            error=np.array(columns[4]),
            notes=notes,
        )
