"""Factorization of complex symmetric matrices on rectangles of nodes, many frequencies at once.

A multifrontal factorization on the plan of a nested dissection, written as batched dense algebra of
PyTorch, so that one code serves CPUs and GPUs: all boxes of a kind, at all frequencies, are one
batch. Real and imaginary parts of the matrices of both modes are positive semidefinite, which
bounds the growth of elimination without pivoting between boxes [Higham 1998, BIT 38, 78];
inside a box rows are pivoted.
"""

from dataclasses import dataclass

import torch

from plait.magnetotellurics.arrays import ComplexArray
from plait.magnetotellurics.dissection import Batch, Dissection, Kind

# Shapes: F frequencies, G boxes of a kind, S own nodes, B boundary nodes, K right-hand sides.


@dataclass(frozen=True, kw_only=True)
class GridMatrix:
    """Five-point symmetric matrices on one rectangle of nodes.

    Attributes:
        values: (n_freq, 3, n_rows, n_columns): the diagonal, the entry between a node and its right
            neighbour, and that between a node and the one below (0 where there is none).
    """

    values: ComplexArray

    def times(self, vectors: ComplexArray) -> ComplexArray:
        """Multiply vectors (n_freq, n, n_rows, n_columns), the same shape."""
        diagonal, across, down = (self.values[:, None, i] for i in range(3))
        found = diagonal * vectors
        found[..., 1:] += across[..., :-1] * vectors[..., :-1]
        found[..., :-1] += across[..., :-1] * vectors[..., 1:]
        found[..., 1:, :] += down[..., :-1, :] * vectors[..., :-1, :]
        found[..., :-1, :] += down[..., :-1, :] * vectors[..., 1:, :]
        return found


@dataclass(frozen=True, kw_only=True)
class _Eliminated:
    """Of one kind: the own block's inverse, and that times the block of own and boundary nodes."""

    inverse_FGSS: torch.Tensor
    coupling_FGSB: torch.Tensor


class GridFactor:
    """The factors of a GridMatrix; solve() serves forward and adjoint, since A is symmetric."""

    def __init__(self, matrix: GridMatrix, plan: Dissection, *, device: str = "cpu") -> None:
        self._plan = plan
        self._device = device
        values = torch.from_numpy(matrix.values.reshape(len(matrix.values), -1)).to(device)
        self._parts: dict[Kind, _Eliminated] = {}
        schur: dict[Kind, torch.Tensor] = {}
        last_parent = {
            child.kind: kind for kind, batch in plan.batches.items() for child in batch.children
        }
        for kind, batch in plan.batches.items():
            front = _front(values, batch, schur)
            inverse_FGSS = torch.linalg.inv(front.own_FGSS)
            coupling_FGSB = inverse_FGSS @ front.outer_FGSB
            self._parts[kind] = _Eliminated(inverse_FGSS=inverse_FGSS, coupling_FGSB=coupling_FGSB)
            schur[kind] = _subtract_product(front.rest_FGBB, front.outer_FGSB.mT, coupling_FGSB)
            for half in {child.kind for child in batch.children}:
                if last_parent[half] == kind:
                    del schur[half]

    def solve(self, right_hand_sides: ComplexArray) -> ComplexArray:
        """Solve for (n_freq, n, n_rows, n_columns), the same shape."""
        num_frequencies, num_sides = right_hand_sides.shape[:2]
        flat = right_hand_sides.reshape(num_frequencies, num_sides, -1)
        given = torch.from_numpy(flat).to(self._device)
        x_FNK = given.mT.clone(memory_format=torch.contiguous_format)
        own: dict[Kind, torch.Tensor] = {}
        outer: dict[Kind, torch.Tensor] = {}
        for kind, batch in self._plan.batches.items():
            own[kind] = x_FNK[:, batch.own]
            size = (num_frequencies, len(batch.own), batch.num_boundary, num_sides)
            rest = x_FNK.new_zeros(size)
            for child in batch.children:
                for run in child.runs:
                    into = own[kind] if run.is_own else rest
                    into[:, :, run.in_parent] += outer[child.kind][:, child.boxes, run.in_child]
            outer[kind] = _subtract_product(rest, self._parts[kind].coupling_FGSB.mT, own[kind])
        for kind, batch in reversed(self._plan.batches.items()):
            part = self._parts[kind]
            # What outer held has served; the boundary's solution takes its place.
            found = part.inverse_FGSS @ own[kind]
            _subtract_product(found, part.coupling_FGSB, outer[kind])
            x_FNK[:, batch.own] = found
            for child in batch.children:
                for run in child.runs:
                    known = found if run.is_own else outer[kind]
                    outer[child.kind][:, child.boxes, run.in_child] = known[:, :, run.in_parent]
        return x_FNK.mT.reshape(right_hand_sides.shape).cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class _Front:
    """The upper triangle of blocks of own and boundary nodes before elimination."""

    own_FGSS: torch.Tensor
    outer_FGSB: torch.Tensor
    rest_FGBB: torch.Tensor


def _front(values: torch.Tensor, batch: Batch, schur: dict[Kind, torch.Tensor]) -> _Front:
    """Assemble own and boundary nodes of all boxes of a kind: entries and what children left."""
    num_frequencies, (num_boxes, num_own) = len(values), batch.own.shape
    num_boundary = batch.num_boundary
    front = _Front(
        own_FGSS=values.new_zeros((num_frequencies, num_boxes, num_own, num_own)),
        outer_FGSB=values.new_zeros((num_frequencies, num_boxes, num_own, num_boundary)),
        rest_FGBB=values.new_zeros((num_frequencies, num_boxes, num_boundary, num_boundary)),
    )
    is_own = batch.column < num_own
    for block, chosen, first in ((front.own_FGSS, is_own, 0), (front.outer_FGSB, ~is_own, num_own)):
        place = batch.row[chosen] * block.shape[3] + batch.column[chosen] - first
        block.flatten(2)[:, :, place] = values[:, batch.source[:, chosen]]
    for child in batch.children:
        left = schur[child.kind]
        for down in child.runs:
            for across in child.runs:
                if across.is_own and not down.is_own:
                    continue  # the lower triangle
                if down.is_own:
                    block = front.own_FGSS if across.is_own else front.outer_FGSB
                else:
                    block = front.rest_FGBB
                part = left[:, child.boxes, down.in_child, across.in_child]
                block[:, :, down.in_parent, across.in_parent] += part
    return front


def _subtract_product(from_: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Subtract left @ right in place, over the first two dims as one batch."""
    if from_.numel():
        flat = from_.flatten(0, 1)
        flat.baddbmm_(left.flatten(0, 1), right.flatten(0, 1), alpha=-1)
    return from_
