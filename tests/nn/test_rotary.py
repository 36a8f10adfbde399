"""Rotary positions: the properties that make them work."""

import pytest
import torch

from plait.errors import ModelError
from plait.nn.rotary import Rope, rotate, rotation_tables


def _rotated(x, positions, rope=None):
    cos, sin = rotation_tables(rope or Rope(), positions[None], x.shape[-1])
    return rotate(x, cos, sin)


def test_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0))
    products = [
        (_rotated(q, torch.tensor([at + 5])) * _rotated(k, torch.tensor([at]))).sum()
        for at in (0, 17, 400)
    ]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), atol=1e-4, rtol=0)


def test_lengths_are_kept_and_position_zero_is_left_alone():
    x = torch.randn(1, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    turned = _rotated(x, torch.arange(6))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_linear_stretching_is_a_slower_walk():
    x = torch.randn(1, 1, 5, 16, generator=torch.Generator().manual_seed(0))
    stretched = _rotated(x, 4 * torch.arange(5), Rope(kind="linear", factor=4.0))
    torch.testing.assert_close(stretched, _rotated(x, torch.arange(5)))


@pytest.mark.parametrize(
    "change",
    [{"theta": 0.0}, {"factor": 0.5}, {"kind": "llama3", "high_freq_factor": 1.0}],
)
def test_values_out_of_range_are_refused(change):
    with pytest.raises(ModelError, match="needs"):
        Rope(**change)
