"""A step of AdamW over many parameters, against the paper's lines in float64."""

import pytest
import torch

from plait.errors import ModelError
from plait.ops.adamw import AdamWSettings, adamw_step_, reference_adamw_step
from tests.ops.exactness import draw

SETTINGS = AdamWSettings(learning_rate=0.1, weight_decay=0.2)
SHAPES = ((7, 5), (33,), (2, 3, 4))


def _state():
    parameters = [draw(*shape, dtype=torch.float32).detach() for shape in SHAPES]
    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
    return parameters, *moments, [torch.zeros(()) for _ in parameters]


def test_three_steps_are_those_of_the_paper():
    parameters, means, squares, steps = _state()
    exact = [[x.double() for x in tensors] for tensors in (parameters, means, squares)]
    for step in range(3):
        gradients = [draw(*shape, dtype=torch.float32, seed=step).detach() for shape in SHAPES]
        adamw_step_(parameters, gradients, means, squares, steps, SETTINGS)
        for i, gradient in enumerate(gradients):
            given = (exact[0][i], gradient.double(), exact[1][i], exact[2][i])
            exact[0][i], exact[1][i], exact[2][i] = reference_adamw_step(*given, step, SETTINGS)
    assert [step.item() for step in steps] == [3.0] * len(SHAPES)
    for found, expected in zip((parameters, means, squares), exact, strict=True):
        for mine, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-6)


def test_lists_that_do_not_belong_together_are_refused():
    parameters, means, squares, steps = _state()
    with pytest.raises(ModelError, match=r"lists of one length, got \[3, 2, 3, 3, 3\]"):
        adamw_step_(parameters, parameters[:2], means, squares, steps, SETTINGS)
    with pytest.raises(ModelError, match="number 1 has"):
        adamw_step_(parameters, [parameters[0]] * 3, means, squares, steps, SETTINGS)
