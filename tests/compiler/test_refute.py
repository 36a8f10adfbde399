"""A rule that calls an operator independent of other tokens, wrongly, is caught by trying it."""

import pytest
import torch

from plait.compiler import token_rules
from plait.compiler.merge import merge
from plait.compiler.replicate import replicate
from plait.compiler.separate import separate
from plait.errors import GraphError
from tests.compiler.test_tokens import MIXERS, graph_of, pytestmark, rules_of

__all__ = ["pytestmark"]
_aten = torch.ops.aten
_PLANTED = {
    "cumsum": (_aten.cumsum.default, token_rules._pointwise),
    "softmax": (_aten._softmax.default, token_rules._pointwise),
    "flip": (_aten.flip.default, token_rules._pointwise),
}


def prepared(name):
    mix, _ = MIXERS[name]
    return merge(separate(graph_of(mix, rules_of(mix))))


@pytest.mark.parametrize("name", ["cumsum", "softmax", "flip"])
def test_a_wrong_rule_is_refuted_by_name(name, monkeypatch):
    graph = prepared(name)
    replicate(graph, 2)
    operator, rule = _PLANTED[name]
    monkeypatch.setitem(token_rules._RULES, operator, rule)
    with pytest.raises(GraphError, match=rf"the rule of {operator} is wrong.*dim 1, the tokens"):
        replicate(graph, 2)


def test_every_operator_of_a_small_model_is_tried_and_the_certificate_says_so():
    found = replicate(prepared("cumsum"), 2)
    assert sum(certificate.num_tried for certificate in found.certificates.values()) > 10
    for certificate in found.certificates.values():
        assert set(certificate.not_tried) <= {"communication"}
        text = f"tried by execution: {certificate.num_tried} distinct operators"
        assert text in str(certificate)
