"""A step of Muon against the iteration written out in float64, and PyTorch's optimizer."""

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops.muon import (
    MuonSettings,
    muon_step_,
    orthogonalize,
    reference_orthogonalize,
)
from tests.ops.exactness import draw

SHAPES = {"square": (24, 24), "wide": (16, 48), "tall": (48, 16), "a little wide": (20, 24)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.15)],
    ids=str,
)
def test_matrices_are_those_of_the_iteration(shape, dtype, tolerance):
    # Five quintic steps enlarge rounding by up to 3.4445^5 = 485; entries are at most about 1.
    x = draw(*shape, dtype=torch.float64).detach()
    found = orthogonalize(x, dtype=dtype)
    assert (found - reference_orthogonalize(x)).abs().max() < tolerance


def test_singular_values_come_near_one():
    x = draw(32, 96, dtype=torch.float32).detach()
    values = torch.linalg.svdvals(orthogonalize(x, dtype=torch.float32))
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_steps_are_those_of_pytorchs_optimizer_but_for_its_bfloat16():
    shapes = list(SHAPES.values())
    parameters = [draw(*shape, dtype=torch.float32) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    momenta = [torch.zeros_like(p, requires_grad=False) for p in parameters]
    optimizer = torch.optim.Muon(theirs, lr=0.1, adjust_lr_fn="match_rms_adamw")
    settings = MuonSettings(learning_rate=0.1, match_adamw=True)
    for step in range(2):
        gradients = [draw(*shape, dtype=torch.float32, seed=step).detach() for shape in shapes]
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        muon_step_(parameters, gradients, momenta, settings)
    for mine, other in zip(parameters, theirs, strict=True):
        size = 0.1 * 0.2 * max(mine.shape) ** 0.5  # of one update
        assert (mine - other).abs().max() < 2 * 0.15 * size


def test_the_operator_keeps_the_rules_of_torch_library():
    x = draw(6, 10, dtype=torch.float32).detach()
    for given in (x, x.T):
        opcheck(torch.ops.plait.orthogonalize.default, (given, torch.float32))


def test_what_is_no_matrix_is_refused():
    settings, x = MuonSettings(learning_rate=0.1), torch.zeros(3, 4)
    with pytest.raises(ModelError, match="number 0 has"):
        muon_step_([torch.zeros(3)], [torch.zeros(3)], [torch.zeros(3)], settings)
    with pytest.raises(ModelError, match="number 0 has"):
        muon_step_([x], [torch.zeros(4, 3)], [x], settings)
    with pytest.raises(ModelError, match="one length"):
        muon_step_([x], [], [x], settings)
