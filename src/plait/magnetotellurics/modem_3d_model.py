"""Read and write ModEM 3-D model files (.rho, .ws): the format of Siripunvaraporn's WSINV3DMT.

A comment, "n_x n_y n_z 0 scale", the three lists of widths, the values layer by layer (for each
layer one column after the other from west to east, each from north to south), the origin and the
rotation. x points north, y east, z down.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plait.errors import SurveyError
from plait.magnetotellurics.arrays import RealArray
from plait.magnetotellurics.modem_model import ModemModel
from plait.magnetotellurics.text_lines import read_text_lines

_SCALES = ("LINEAR", "LOGE", "LOG10")


@dataclass(frozen=True, kw_only=True)
class Modem3dModel:
    """One 3-D model.

    Attributes:
        x_width_m, y_width_m, thickness_m: (n_x,) from south to north, (n_y,) from west to east, and
            (n_z,) from the top down.
        value: (n_x, n_y, n_z), in the file's own scale.
        scale: LINEAR, LOGE or LOG10, of a resistivity in ohm m.
        origin_m: x, y and z of the south-western top corner.
        rotation_deg: of the grid, clockwise from north.
    """

    x_width_m: RealArray
    y_width_m: RealArray
    thickness_m: RealArray
    value: RealArray
    scale: str
    origin_m: tuple[float, float, float]
    rotation_deg: float

    def resistivity_ohm_m(self) -> RealArray:
        """Give the resistivity of each cell, (n_x, n_y, n_z) in ohm m."""
        if self.scale == "LOGE":
            return np.exp(self.value)
        return 10.0**self.value if self.scale == "LOG10" else self.value

    def section(self, x_m: float) -> ModemModel:
        """Cut along y at one x; y of the 2-D model begins at its left edge, origin_m[1].

        Raises:
            SurveyError: an x outside the model.
        """
        edges = self.origin_m[0] + np.concatenate([[0.0], np.cumsum(self.x_width_m)])
        if not edges[0] <= x_m < edges[-1]:
            raise SurveyError(f"x = {x_m:g} m lies outside {edges[0]:g} to {edges[-1]:g} m")
        row = int(np.searchsorted(edges, x_m, side="right")) - 1
        return ModemModel(
            width_m=self.y_width_m,
            thickness_m=self.thickness_m,
            value=self.value[row].T,
            scale=self.scale,
        )


def read_modem_3d_model(path: str | Path) -> Modem3dModel:
    """Read a ModEM 3-D model.

    Raises:
        SurveyError: with file and line: a header that does not fit, tables of resistivity codes,
            too few or too many numbers, a width that is not positive, no origin or rotation.
    """
    lines = read_text_lines(path)
    number = 1
    while lines.line(number).lstrip().startswith("#") or not lines.line(number).strip():
        number += 1
    words = lines.line(number).split()
    if len(words) not in (4, 5):
        lines.fail(number, "expected 'n_x n_y n_z 0 scale'")
    sizes = [lines.whole(number, word, what="size") for word in words[:3]]
    if min(sizes) < 1:
        lines.fail(number, "sizes must be positive")
    if lines.whole(number, words[3], what="codes") != 0:
        lines.fail(number, "tables of resistivity codes are not read; the fourth number must be 0")
    scale = words[4].upper() if len(words) == 5 else "LINEAR"
    if scale not in _SCALES:
        lines.fail(number, f"unknown scale {words[4]!r}, expected one of {', '.join(_SCALES)}")
    widths, number = [], number + 1
    for size, name in zip(sizes, ("x widths", "y widths", "layers"), strict=True):
        taken = lines.take(number, size, what=name)
        if (taken.values <= 0).any():
            lines.fail(taken.next_line - 1, "widths must be positive")
        widths.append(taken.values)
        number = taken.next_line
    values = lines.take(number, int(np.prod(sizes)), what="values")
    if scale == "LINEAR" and (values.values <= 0).any():
        lines.fail(number, "a resistivity is not positive")
    layers = values.values.reshape(sizes[2], sizes[1], sizes[0])[:, :, ::-1]
    rest = [
        (line, lines.line(line).split())
        for line in range(values.next_line, lines.num_lines + 1)
        if lines.line(line).strip()
    ]
    # Guessing them would turn a cut file into a model at a wrong place.
    if [len(words) for _, words in rest] != [3, 1]:
        lines.fail(
            rest[0][0] if rest else lines.num_lines,
            "expected two lines after the values: the origin x y z, and the rotation in degrees",
        )
    (line, words), (last, turn) = rest
    x, y, z = (lines.number(line, word, what="origin") for word in words)
    return Modem3dModel(
        x_width_m=widths[0],
        y_width_m=widths[1],
        thickness_m=widths[2],
        value=np.ascontiguousarray(layers.transpose(2, 1, 0)),
        scale=scale,
        origin_m=(x, y, z),
        rotation_deg=lines.number(last, turn[0], what="rotation"),
    )


def write_modem_3d_model(path: str | Path, model: Modem3dModel, *, title: str) -> None:
    """Write a ModEM 3-D model; read_modem_3d_model gives the same numbers back to 9 digits."""
    sizes = " ".join(str(size) for size in model.value.shape)
    text = [f"# {title}", f"{sizes} 0 {model.scale}"]
    for widths in (model.x_width_m, model.y_width_m, model.thickness_m):
        text.append(" ".join(f"{width:.9G}" for width in widths))
    for layer in model.value.transpose(2, 1, 0):
        text += ["", *(" ".join(f"{value:.9E}" for value in row[::-1]) for row in layer)]
    text += ["", " ".join(f"{part:.3f}" for part in model.origin_m), f"{model.rotation_deg:.4f}"]
    Path(path).write_text("\n".join([*text, ""]), encoding="utf-8")
