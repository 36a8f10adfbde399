"""`torch.compile(model, backend="plait", options={"replicas": 2})` of a model spread over ranks.

One process stands for both ranks: its collectives return what it sends, in eager PyTorch too. Real
processes are in tests/compiler/replica_worker.py.
"""

import pytest
import torch
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

import plait
from plait.errors import PlanError
from plait.graph.parallelize import parallelize
from plait.graph.plan_mesh import plan_mesh
from tests.compiler.replica_models import Case
from tests.compiler.test_tokens import pytestmark

__all__ = ["pytestmark"]
# A product of fewer rows may be summed in another order.
TOLERANCE = 2e-5


@pytest.fixture
def mesh():
    # DTensor remembers results with their mesh, and takes an equal mesh of a closed group for it.
    _clear_sharding_prop_cache()
    with plan_mesh(plait.ParallelPlan(tp=2)) as mesh:
        yield mesh
        torch._dynamo.reset()


def step(model, run, tokens):
    model.zero_grad()
    result = run(tokens)  # of our decoder, what its head takes
    result = getattr(result, "logits", result)
    result.float().square().mean().backward()
    used = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(used) > 10
    return {"result": result.detach(), **{name: x.to_local() for name, x in used.items()}}


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert (found[name] - x).abs().max() <= TOLERANCE * x.abs().max(), name


@pytest.mark.parametrize("name", ["our_llama", "gpt2"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_spread_model_is_compiled_in_replicas_and_agrees_with_eager(name, batch, mesh):
    case = Case(name, batch=batch)
    model = parallelize(case.model(), case.plan(), mesh)
    expected = step(model, model, case.tokens())
    compiled = plait.jit(model, replicas=2)
    assert_near(step(model, compiled, case.tokens()), expected)
    axis = "batch" if batch > 1 else "token"
    assert f"split in 2 along the {axis}" in str(compiled.report())
    assert "all_reduce" in str(compiled.report())


def test_the_one_line_form_takes_replicas(mesh):
    case = Case("our_llama")
    model = parallelize(case.model(), case.plan(), mesh)
    expected = step(model, model, case.tokens())
    compiled = torch.compile(model, backend="plait", options={"replicas": 2})
    assert_near(step(model, compiled, case.tokens()), expected)


def test_a_number_of_replicas_that_cannot_be_had_is_refused(mesh):
    case = Case("our_llama", num_tokens=3)
    model = parallelize(case.model(), case.plan(), mesh)
    with pytest.raises(Exception, match=r"3 tokens over 1 ranks cannot be parted for 4 replicas"):
        plait.jit(model, replicas=4)(case.tokens())
    with pytest.raises(PlanError, match=r"replicas must be .auto., a number from 1, .*got 0"):
        plait.jit(model, replicas=0)


def test_a_model_that_lies_on_one_rank_is_compiled_as_without_replicas():
    model = Case("our_llama").model()
    tokens = Case("our_llama").tokens()
    compiled = plait.jit(model, replicas=2)
    assert torch.equal(compiled(tokens), model(tokens))
    torch._dynamo.reset()
