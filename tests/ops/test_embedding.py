"""Rows of a table and their gradient, against a product with single ones in float64."""

import pytest
import torch
from torch.library import opcheck

from plait.errors import ModelError
from plait.ops.embedding import embedding, embedding_work, reference_embedding
from tests.ops.exactness import TOLERANCES, check_exact, draw

TOKENS = torch.tensor([[3, 0, 3], [3, 8, 8]])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS.int()], ids=["int64", "int32"])
def test_rows_and_gradient_are_the_formulas(dtype, tokens):
    check_exact(
        lambda table: embedding(tokens, table),
        lambda table: reference_embedding(tokens, table),
        (draw(9, 6, dtype=dtype),),
    )


def test_the_kernel_keeps_the_rules_of_torch_library():
    opcheck(torch.ops.aten.embedding.default, (draw(9, 6, dtype=torch.float32), TOKENS))


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(ModelError, match=r"table \(V, D\)"):
        embedding(TOKENS, torch.zeros(3))
    with pytest.raises(ModelError, match="int32 or int64"):
        embedding(TOKENS.float(), torch.zeros(9, 6))
    with pytest.raises(IndexError):
        embedding(TOKENS, torch.zeros(3, 6))


def test_the_backward_writes_the_whole_table():
    forward, backward = embedding_work(TOKENS, torch.zeros(9, 6))
    assert forward.bytes == 6 * 8 + 2 * 6 * 6 * 4
    assert backward.bytes == 6 * 8 + 6 * 6 * 4 + 9 * 6 * 4
