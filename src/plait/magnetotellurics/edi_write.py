"""Write a station as an EDI file of impedances and tippers, in mV/km/nT with e^{+i w t}."""

from pathlib import Path

import numpy as np

from plait.magnetotellurics.survey import OHM_PER_FIELD_UNIT, Station

_EMPTY = 1e32
_AXES = ("X", "Y")


def write_edi(path: str | Path, station: Station) -> None:
    """Write one station; read_edi gives the same numbers back to 9 digits.

    Absent values are written as the EMPTY value 1e32, an absent variance too.
    """
    z = station.impedance_ohm / OHM_PER_FIELD_UNIT
    z_variance = (station.impedance_error_ohm / OHM_PER_FIELD_UNIT) ** 2
    text = [*_head(station)]
    text += _block("FREQ", station.frequency_hz)
    text += _block("ZROT", station.rotation_deg)
    for i, row in enumerate(_AXES):
        for j, column in enumerate(_AXES):
            name = f"Z{row}{column}"
            text += _block(f"{name}R ROT=ZROT", z[:, i, j].real)
            text += _block(f"{name}I ROT=ZROT", z[:, i, j].imag)
            text += _block(f"{name}.VAR ROT=ZROT", z_variance[:, i, j])
    text += _block("TROT", station.rotation_deg)
    for j, axis in enumerate(_AXES):
        text += _block(f"T{axis}R.EXP ROT=TROT", station.tipper[:, j].real)
        text += _block(f"T{axis}I.EXP ROT=TROT", station.tipper[:, j].imag)
        text += _block(f"T{axis}VAR.EXP ROT=TROT", station.tipper_error[:, j] ** 2)
    Path(path).write_text("\n".join([*text, ">END", ""]), encoding="ascii", errors="replace")


def _head(station: Station) -> list[str]:
    lines = [">HEAD", f'DATAID="{station.name}"']
    places = (
        ("LAT", station.latitude_deg),
        ("LONG", station.longitude_deg),
        ("ELEV", station.elevation_m),
    )
    lines += [f"{key}={value:.9g}" for key, value in places if np.isfinite(value)]
    lines += ['STDVERS="SEG 1.0"', 'PROGVERS="plait"', f"EMPTY={_EMPTY:.1E}", "", ">INFO"]
    lines += [f"NOTE: {note}" for note in station.notes]
    return [*lines, "", ">=MTSECT", f"NFREQ={len(station.frequency_hz)}", ""]


def _block(name: str, values: np.ndarray) -> list[str]:
    words = [f"{_EMPTY if np.isnan(value) else value: .9E}" for value in values]
    rows = [" ".join(words[start : start + 5]) for start in range(0, len(words), 5)]
    return [f">{name} // {len(values)}", *rows]
