"""The plan of a nested dissection of a rectangle of nodes, made once for a mesh [George 1973].

A box of nodes is cut by a line of nodes (a separator) into two boxes, and so on until boxes are
small leaves. Boxes of one size that touch the same sides of the rectangle are alike in everything
but their place, so they form a *kind*, and all boxes of a kind are eliminated in one batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from plait.magnetotellurics.arrays import IndexArray

_LEAF_NODES = 16  # fitted: smaller leaves cost calls, larger ones cost arithmetic


class Kind(NamedTuple):
    """Rows and columns of a box, and on which sides nodes of a separator follow."""

    rows: int
    columns: int
    top: bool
    bottom: bool
    left: bool
    right: bool


class Run(NamedTuple):
    """Neighbouring boundary nodes of a child that are neighbours in its parent, too.

    in_parent counts the parent's own nodes or, where is_own is false, its boundary nodes.
    """

    in_child: slice
    in_parent: slice
    is_own: bool


@dataclass(frozen=True, kw_only=True)
class Child:
    """One half of every box of a kind: its kind, its boxes in the same order, and its boundary."""

    kind: Kind
    boxes: slice
    runs: tuple[Run, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """All boxes of a kind: what is eliminated together.

    Attributes:
        own: (n_boxes, n_own) nodes that are eliminated here: the separator, or a whole leaf.
        num_boundary: how many nodes around each box are eliminated later.
        children: none for leaves, else two.
        source: (n_boxes, n_entries) which matrix entry; see GridMatrix.
        row, column: (n_entries,) where it goes; own nodes count before boundary nodes.
    """

    own: IndexArray
    num_boundary: int
    children: tuple[Child, ...]
    source: IndexArray
    row: IndexArray
    column: IndexArray


@dataclass(frozen=True, kw_only=True)
class Dissection:
    """Batches in an order in which children come before parents."""

    shape: tuple[int, int]
    batches: dict[Kind, Batch]


def dissect(num_rows: int, num_columns: int) -> Dissection:
    """Plan the elimination of a rectangle of nodes, numbered row by row."""
    root = Kind(num_rows, num_columns, top=False, bottom=False, left=False, right=False)
    waiting = {root: [np.zeros((1, 2), dtype=int)]}
    batches: dict[Kind, Batch] = {}
    while waiting:
        # A box is larger than its halves, so that all boxes of the largest kind are known.
        kind = max(waiting, key=lambda kind: kind.rows * kind.columns)
        origins = np.concatenate(waiting.pop(kind))
        children = []
        for half, place in _halves(kind):
            boxes = waiting.setdefault(half, [])
            start = sum(map(len, boxes))
            boxes.append(origins + place)
            runs = tuple(_runs(kind, half, place))
            children.append(Child(kind=half, boxes=slice(start, start + len(origins)), runs=runs))
        batches[kind] = _batch(kind, origins, tuple(children), num_rows, num_columns)
    return Dissection(shape=(num_rows, num_columns), batches=dict(reversed(batches.items())))


def _is_leaf(kind: Kind) -> bool:
    return kind.rows * kind.columns <= _LEAF_NODES or max(kind.rows, kind.columns) < 3


def _halves(kind: Kind) -> list[tuple[Kind, tuple[int, int]]]:
    """Give both halves of a box and their places in it; none of a leaf."""
    if _is_leaf(kind):
        return []
    rows, columns = kind.rows, kind.columns
    if columns >= rows:
        middle = columns // 2
        return [
            (kind._replace(columns=middle, right=True), (0, 0)),
            (kind._replace(columns=columns - middle - 1, left=True), (0, middle + 1)),
        ]
    middle = rows // 2
    return [
        (kind._replace(rows=middle, bottom=True), (0, 0)),
        (kind._replace(rows=rows - middle - 1, top=True), (middle + 1, 0)),
    ]


def _own(kind: Kind) -> list[tuple[int, int]]:
    """Places of the nodes that a box eliminates itself."""
    rows, columns = range(kind.rows), range(kind.columns)
    if _is_leaf(kind):
        return [(r, c) for r in rows for c in columns]
    if kind.columns >= kind.rows:
        return [(r, kind.columns // 2) for r in rows]
    return [(kind.rows // 2, c) for c in columns]


def _boundary(kind: Kind) -> list[tuple[int, int]]:
    """Places of the nodes around a box; a five-point stencil does not reach its corners."""
    places = []
    if kind.top:
        places += [(-1, c) for c in range(kind.columns)]
    if kind.bottom:
        places += [(kind.rows, c) for c in range(kind.columns)]
    if kind.left:
        places += [(r, -1) for r in range(kind.rows)]
    if kind.right:
        places += [(r, kind.columns) for r in range(kind.rows)]
    return places


def _runs(kind: Kind, half: Kind, place: tuple[int, int]) -> Iterator[Run]:
    """Match the boundary of a half with the nodes of its parent, in runs as long as they get."""
    own = {node: i for i, node in enumerate(_own(kind))}
    boundary = {node: i for i, node in enumerate(_boundary(kind))}
    matched = []
    for r, c in _boundary(half):
        node = (r + place[0], c + place[1])
        matched.append((node in own, own[node] if node in own else boundary[node]))
    start = 0
    for end in range(1, len(matched) + 1):
        is_own, first = matched[start]
        if end == len(matched) or matched[end] != (is_own, first + end - start):
            yield Run(slice(start, end), slice(first, first + end - start), is_own)
            start = end


def _batch(
    kind: Kind,
    origin: IndexArray,
    children: tuple[Child, ...],
    num_rows: int,
    num_columns: int,
) -> Batch:
    own, boundary = _own(kind), _boundary(kind)
    where = {place: i for i, place in enumerate(own + boundary)}
    first = origin[:, 0] * num_columns + origin[:, 1]

    entries = list(_entries(own, where, num_rows * num_columns, num_columns))
    source, row, column = (np.array(part, dtype=int) for part in zip(*entries, strict=True))
    return Batch(
        own=first[:, None] + np.array([r * num_columns + c for r, c in own]),
        num_boundary=len(boundary),
        children=children,
        source=first[:, None] + source,
        row=row,
        column=column,
    )


def _entries(
    own: list[tuple[int, int]], where: dict[tuple[int, int], int], num_nodes: int, num_columns: int
) -> Iterator[tuple[int, int, int]]:
    """Matrix entries in which a box's own nodes take part: diagonal, across, down."""
    for r, c in own:
        node, i = r * num_columns + c, where[r, c]
        yield node, i, i
        for kind, (down, right) in ((1, (0, 1)), (2, (1, 0))):
            for sign, start in ((1, node), (-1, node - down * num_columns - right)):
                j = where.get((r + sign * down, c + sign * right))
                # An own neighbour gives the entry of the other triangle when it is its turn.
                if j is not None:
                    yield kind * num_nodes + start, i, j
