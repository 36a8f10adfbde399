"""Parts written where the whole will be: the same bits, and no copy; a copy where it must be."""

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from plait.compiler.assemble import ASSEMBLED, assemble
from plait.graph.graph import module_of

WRITTEN = {
    "products": lambda x, w: torch.cat([x[:2] @ w, x[2:] @ w]),
    "products of three dims, flattened": lambda x, w: torch.cat(
        [(x[:2] @ w).view(2, 2, 4), (x[2:] @ w).view(2, 2, 4)]
    ),
    "sums and products": lambda x, w: torch.cat([x[:2] + 1.5, x[2:] @ w]),
    "activations": lambda x, w: torch.cat([torch.nn.functional.silu(x[:2]), torch.tanh(x[2:])]),
    "gradients of an activation": lambda x, w: torch.cat(
        [torch.ops.aten.silu_backward(x[:2] + 1, x[:2]), x[2:] @ w]
    ),
    "one row, along its columns": lambda x, w: torch.cat([x[:1] @ w, x[1:2] @ w], 1),
}
KEPT = {
    "columns of several rows": lambda x, w: torch.cat([x[:2] @ w, x[2:] @ w], 1),
    "an operator that writes nowhere else": lambda x, w: torch.cat([x[:2].sin(), x[2:] @ w]),
    "a part that is the caller's": lambda x, w: torch.cat([x, x[2:] @ w]),
    "a transposed part": lambda x, w: torch.cat([(w.t() @ x.t()).t(), x[2:] @ w]),
    "a piece of a larger value": lambda x, w: torch.cat([(x @ w)[1:], x[:1] @ w]),
    "one value twice": lambda x, w: (lambda y: torch.cat([y, y]))(x @ w),
}


def traced(function):
    torch.manual_seed(0)
    inputs = torch.randn(4, 8), torch.randn(8, 8)
    graph = make_fx(lambda x, w: (function(x, w),), tracing_mode="fake")(*inputs).graph
    for cat in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        cat.meta[ASSEMBLED] = True
    return module_of(torch.nn.Module(), graph), inputs


def copies(module):
    return len(module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default))


def result_of(module, inputs):
    return fx.GraphModule(module, module.graph)(*inputs)[0]


@pytest.mark.parametrize("function", WRITTEN.values(), ids=WRITTEN)
def test_parts_are_written_into_the_whole_with_the_same_bits(function):
    module, inputs = traced(function)
    assembled = assemble(module)
    assert (copies(module), copies(assembled)) == (1, 0)
    assert torch.equal(result_of(assembled, inputs), function(*inputs))


@pytest.mark.parametrize("function", KEPT.values(), ids=KEPT)
def test_a_whole_that_must_be_copied_is_copied(function):
    module, inputs = traced(function)
    assembled = assemble(module)
    assert copies(assembled) == 1
    assert torch.equal(result_of(assembled, inputs), function(*inputs))


def test_a_cat_of_the_users_own_stays_as_it_is():
    module, _ = traced(WRITTEN["products"])
    for cat in module.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        del cat.meta[ASSEMBLED]
    assert assemble(module) is module


def test_a_part_that_goes_into_two_wholes_is_written_into_the_first():
    def function(x, w):
        part = x[:2] @ w
        return torch.cat([part, x[2:] @ w]) + torch.cat([part, x[2:] * 2])

    module, inputs = traced(function)
    assembled = assemble(module)
    assert copies(assembled) == 1
    assert torch.equal(result_of(assembled, inputs), function(*inputs))
