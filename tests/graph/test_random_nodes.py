"""Which operators draw random numbers, and so are neither dropped nor run again."""

import pytest
import torch
from torch.fx import Graph

from plait.graph.random_nodes import is_random

_aten = torch.ops.aten


def node_of(operator, *others, **named):
    graph = Graph()
    tensors = [graph.placeholder(name) for name in "qkv"]
    return graph.call_function(operator, (*tensors, *others), named)


@pytest.mark.parametrize(
    ("operator", "before"),
    [
        (_aten._scaled_dot_product_flash_attention.default, ()),
        (_aten._scaled_dot_product_efficient_attention.default, (None, True)),
        (_aten._scaled_dot_product_cudnn_attention.default, (None, True)),
    ],
    ids=["flash", "efficient", "cudnn"],
)
def test_attention_of_a_gpu_draws_only_with_dropout(operator, before):
    for quiet in (node_of(operator, *before), node_of(operator, *before, 0.0)):
        assert torch.Tag.nondeterministic_seeded in quiet.target.tags  # what PyTorch says of it
        assert not is_random(quiet)
    for loud in (node_of(operator, *before, 0.1), node_of(operator, *before, dropout_p=0.1)):
        assert is_random(loud)


def test_what_has_no_dropout_to_switch_off_is_as_pytorch_marks_it():
    graph = Graph()
    x = graph.placeholder("x")
    assert is_random(graph.call_function(_aten.bernoulli.p, (x, 0.5)))
    assert not is_random(graph.call_function(_aten.mul.Tensor, (x, x)))
    assert not is_random(x)
