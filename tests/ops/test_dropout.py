"""Dropout from counters: the same mask everywhere, and one that looks random."""

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops.dropout import dropout, reference_dropout
from tests.ops.exactness import draw

# Inductor itself imports what PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_mask_is_that_of_the_papers_integers(dtype):
    x = draw(3, 41, dtype=dtype)
    given = {"p": 0.3, "seed": 11, "stream": 5, "start": 10**12}
    found, expected = dropout(x, **given), reference_dropout(x, **given)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected)
    tangent = torch.ones_like(x)
    (gradient,) = torch.autograd.grad(found, x, tangent)
    assert torch.equal(gradient == 0, found == 0)


@pytest.mark.slow
def test_the_compiled_kernel_draws_the_same():
    x = torch.ones(200, 301)
    given = {"p": 0.3, "seed": 2**63 + 7, "stream": 1}
    assert torch.equal(dropout(x, **given) == 0, reference_dropout(x, **given) == 0)


def test_a_part_has_its_part_of_the_mask():
    x = torch.ones(8, 32)
    whole = dropout(x, 0.5, seed=3)
    assert torch.equal(whole[5:], dropout(x[5:], 0.5, seed=3, start=5 * 32))


def test_kept_elements_are_as_many_as_asked_and_independent():
    x = torch.ones(100, 100)
    masks = [dropout(x, 0.25, seed=seed, stream=s) > 0 for seed, s in ((0, 0), (0, 1), (1, 0))]
    masks.append(masks[0].roll(1, dims=1))  # a neighbour's
    for i, mask in enumerate(masks):
        # Binomial: standard deviation 0.0043 of the share, five of them allowed.
        assert abs(mask.double().mean() - 0.75) < 0.022
        for other in masks[:i]:
            # Of two independent masks 0.75^2 + 0.25^2 agree, standard deviation 0.0048.
            assert abs((mask == other).double().mean() - 0.625) < 0.025


def test_the_operator_keeps_the_rules_of_torch_library():
    x, state = draw(5, 8, dtype=torch.float32), torch.tensor([12345, 0])
    opcheck(torch.ops.plait.dropout.default, (x, state, 0.5))


def test_what_is_no_probability_is_refused():
    for p in (-0.1, 1.0):
        with pytest.raises(ModelError, match="0 <= p < 1"):
            dropout(torch.ones(3), p, seed=0)
    with pytest.raises(ModelError, match="start=-1"):
        dropout(torch.ones(3), 0.5, seed=0, start=-1)
