"""Read Occam2D mesh, model and iteration files, and write iterations.

The mesh is fine; the model joins its cells into bricks, one parameter each (log10 ohm m), numbered
layer by layer from the left. Source: Occam2DMT 3.0 manual; deGroot-Hedlin and Constable 1990.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from plait.magnetotellurics.text_lines import TextLines, read_text_lines


@dataclass(frozen=True, kw_only=True)
class Occam2dMesh:
    """Cell sizes of the fine mesh: width_m (n_y,), thickness_m (n_z,), from the surface down."""

    width_m: np.ndarray
    thickness_m: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Occam2dModel:
    """How bricks cover the mesh.

    Attributes:
        brick: (n_z, n_y) integers from 0, the parameter of each cell.
        binding_offset_m: profile coordinate of the right edge of the top left brick.
        first_brick_columns: how many mesh columns that brick covers.
        mesh_file: name of the mesh file.
    """

    brick: np.ndarray
    binding_offset_m: float
    first_brick_columns: int
    mesh_file: str

    @property
    def num_bricks(self) -> int:
        """How many parameters the model has."""
        return int(self.brick.max()) + 1


@dataclass(frozen=True, kw_only=True)
class Occam2dIteration:
    """Parameters of one iteration: log10_rho (n_bricks,), and the header as text."""

    log10_rho: np.ndarray
    header: dict[str, str]


def read_occam2d_mesh(path: str | Path) -> Occam2dMesh:
    """Read a mesh whose cells are all free ("?").

    Raises:
        SurveyError: with file and line: counts that do not hold, fixed cells (they are not
            supported), a width that is not positive.
    """
    lines = read_text_lines(path)
    words = lines.line(2).split()
    if len(words) < 3:
        lines.fail(2, "expected the numbers of horizontal and vertical nodes")
    num_y, num_z = (lines.whole(2, word, what="nodes") - 1 for word in words[1:3])
    if num_y < 1 or num_z < 1:
        lines.fail(2, "a mesh needs at least two nodes each way")
    taken = lines.take(3, num_y + num_z, what="cell sizes")
    if (taken.values <= 0).any():
        lines.fail(taken.next_line - 1, "cell sizes must be positive")
    if lines.line(taken.next_line).strip() != "0":
        lines.fail(taken.next_line, "fixed resistivities are not supported; expected '0'")
    # Each cell is four triangles, one row of letters for each.
    for number in range(taken.next_line + 1, taken.next_line + 1 + 4 * num_z):
        row = lines.line(number).strip()
        if row != "?" * num_y:
            lines.fail(
                number, f"expected {num_y} times '?', found {len(row)} characters {row[:9]!r}"
            )
    return Occam2dMesh(width_m=taken.values[:num_y], thickness_m=taken.values[num_y:])


def read_occam2d_model(path: str | Path) -> Occam2dModel:
    """Read a model file without exceptions to the regularization.

    Raises:
        SurveyError: with file and line: a layer whose bricks do not cover the mesh, exceptions.
    """
    lines = read_text_lines(path)
    header, number = _header(lines, last="NUM LAYERS")
    num_layers = lines.whole(number - 1, header["NUM LAYERS"], what="NUM LAYERS")
    if num_layers < 1:
        lines.fail(number - 1, "NUM LAYERS must be positive")
    rows: list[np.ndarray] = []
    first_brick = 0
    next_brick = 0
    for _ in range(num_layers):
        words = lines.line(number).split()
        if len(words) != 2:
            lines.fail(number, "expected the numbers of mesh rows and of bricks")
        num_rows, num_bricks = (lines.whole(number, word, what="layer") for word in words)
        taken = lines.take(number + 1, num_bricks, what="bricks")
        columns = taken.values.astype(int)
        if (columns != taken.values).any() or (columns < 1).any() or num_rows < 1:
            lines.fail(number + 1, "bricks and layers must cover whole mesh cells")
        first_brick = first_brick or int(columns[0])
        row = np.repeat(np.arange(next_brick, next_brick + num_bricks), columns)
        if rows and len(row) != len(rows[0]):
            lines.fail(
                number + 1, f"bricks cover {len(row)} columns, the layers above {len(rows[0])}"
            )
        rows += [row] * num_rows
        next_brick += num_bricks
        number = taken.next_line
    found = lines.line(number).split()
    if found[:2] != ["NO.", "EXCEPTIONS:"] or lines.whole(number, found[-1], what="exceptions"):
        lines.fail(number, "expected 'NO. EXCEPTIONS: 0'; exceptions are not supported")
    return Occam2dModel(
        brick=np.array(rows),
        binding_offset_m=lines.number(1, header.get("BINDING OFFSET", "0"), what="BINDING OFFSET"),
        first_brick_columns=first_brick,
        mesh_file=header.get("MESH FILE", ""),
    )


def read_occam2d_iteration(path: str | Path) -> Occam2dIteration:
    """Read a startup or iteration file.

    Raises:
        SurveyError: with file and line: a count of parameters that does not hold.
    """
    lines = read_text_lines(path)
    header, number = _header(lines, last="PARAM COUNT")
    count = lines.whole(number - 1, header["PARAM COUNT"], what="PARAM COUNT")
    taken = lines.take(number, count, what="parameters")
    for after in range(taken.next_line, lines.num_lines + 1):
        if lines.line(after).strip():
            lines.fail(after, "text after the last parameter")
    return Occam2dIteration(log10_rho=taken.values, header=header)


def write_occam2d_iteration(path: str | Path, iteration: Occam2dIteration) -> None:
    """Write an iteration file; read_occam2d_iteration gives it back to 9 digits."""
    header = {**iteration.header, "PARAM COUNT": str(len(iteration.log10_rho))}
    count = header.pop("PARAM COUNT")
    text = [f"{key.title()}: {value}" for key, value in header.items()]
    text.append(f"Param Count: {count}")
    values = [f"{value: .9E}" for value in iteration.log10_rho]
    text += [" ".join(values[start : start + 4]) for start in range(0, len(values), 4)]
    Path(path).write_text("\n".join([*text, ""]), encoding="ascii")


def _header(lines: TextLines, *, last: str) -> tuple[dict[str, str], int]:
    """Read 'key: value' lines up to and with the key last; give them and the next line."""
    header: dict[str, str] = {}
    for number in range(1, lines.num_lines + 1):
        text = lines.line(number)
        if text.lstrip().startswith("!"):
            continue
        key, colon, value = text.partition(":")
        if not colon:
            lines.fail(number, f"expected 'key: value' before {last!r}")
        header[key.strip().upper()] = value.strip()
        if key.strip().upper() == last:
            return header, number + 1
    return lines.fail(lines.num_lines, f"no line {last!r}")
