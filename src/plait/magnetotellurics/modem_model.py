"""Read and write ModEM 2-D model files (.rho): cell widths and values row by row."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plait.errors import SurveyError
from plait.magnetotellurics.text_lines import read_text_lines

_SCALES = ("LOGE", "LOG10", "LINEAR")


@dataclass(frozen=True, kw_only=True)
class ModemModel:
    """One .rho file.

    Attributes:
        width_m: (n_y,), columns from left to right; the left edge is y = 0.
        thickness_m: (n_z,), rows from the surface down; no air.
        value: (n_z, n_y), in the file's own scale; perturbations and gradients use it as well.
        scale: LOGE, LOG10 or LINEAR, of a resistivity in ohm m.
    """

    width_m: np.ndarray
    thickness_m: np.ndarray
    value: np.ndarray
    scale: str

    def __post_init__(self) -> None:
        if self.scale not in _SCALES:
            raise SurveyError(f"unknown scale {self.scale!r}, expected one of {', '.join(_SCALES)}")
        if self.value.shape != (len(self.thickness_m), len(self.width_m)):
            raise SurveyError(
                f"the values have shape {self.value.shape}, which the widths do not fit"
            )

    def resistivity_ohm_m(self) -> np.ndarray:
        """Give the resistivity of each cell, (n_z, n_y) in ohm m."""
        if self.scale == "LOGE":
            return np.exp(self.value)
        return 10.0**self.value if self.scale == "LOG10" else self.value


def read_modem_model(path: str | Path) -> ModemModel:
    """Read a ModEM 2-D model.

    Raises:
        SurveyError: with file and line: an unknown scale, too few or too many numbers, a width
            that is not positive.
    """
    lines = read_text_lines(path)
    words = lines.line(1).split()
    if len(words) != 3 or words[2].upper() not in _SCALES:
        lines.fail(1, f"expected 'n_y n_z scale' with scale one of {', '.join(_SCALES)}")
    num_y, num_z = (lines.whole(1, word, what="size") for word in words[:2])
    if num_y < 1 or num_z < 1:
        lines.fail(1, "sizes must be positive")
    widths = lines.take(2, num_y, what="column widths")
    depths = lines.take(widths.next_line, num_z, what="row thicknesses")
    for taken in (widths, depths):
        if (taken.values <= 0).any():
            lines.fail(taken.next_line - 1, "widths must be positive")
    # "0": the values are written out; "1" in files made for ModEM, which mean the same here.
    if lines.line(depths.next_line).split() not in (["0"], ["1"]):
        lines.fail(depths.next_line, "expected a line '0' or '1' before the values")
    values = lines.take(depths.next_line + 1, num_y * num_z, what="values")
    for number in range(values.next_line, lines.num_lines + 1):
        if lines.line(number).strip():
            lines.fail(number, "text after the last value")
    return ModemModel(
        width_m=widths.values,
        thickness_m=depths.values,
        value=values.values.reshape(num_z, num_y),
        scale=words[2].upper(),
    )


def write_modem_model(path: str | Path, model: ModemModel) -> None:
    """Write a ModEM 2-D model; read_modem_model gives the same numbers back to 9 digits."""
    text = [f"{len(model.width_m)} {len(model.thickness_m)} {model.scale}"]
    for widths in (model.width_m, model.thickness_m):
        text += [
            " ".join(f"{width:.9G}" for width in widths[start : start + 10])
            for start in range(0, len(widths), 10)
        ]
    text.append("1")
    text += [" ".join(f"{value:.9E}" for value in row) for row in model.value]
    Path(path).write_text("\n".join([*text, ""]), encoding="ascii")
