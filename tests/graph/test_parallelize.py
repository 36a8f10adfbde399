"""A spread model against the same model in one process: all ranks computed here, for real."""

import pytest
import torch
from torch import nn
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.distributed.tensor import DTensor, Replicate

from plait.errors import PlanError
from plait.graph.parallelize import keep_local_parameters, parallelize, whole_parameter
from plait.graph.plan_mesh import plan_mesh
from plait.plan.parallel_plan import ParallelPlan
from tests.graph.spread_models import MODELS, hugging_face, loss, own, tokens

# float32; sums over features are taken in parts, and the parts added: measured 1e-6 of the largest
# gradient of a parameter with one process, up to 4e-6 spread.
TOLERANCE = 1e-5
LOSS_TOLERANCE = 1e-6

_QUICK = {(4, True)}
_ALL = {(2, False), (2, True), (4, False)}
_OFTEN = ("our_llama", "gpt2", "phi3", "olmo2")


def cases():
    for name in MODELS:
        for tp, sp in sorted(_QUICK | _ALL):
            is_slow = (tp, sp) not in _QUICK and not (name in _OFTEN and (tp, sp) == (2, False))
            marks = [pytest.mark.exhaustive] if is_slow else []
            yield pytest.param(name, tp, sp, id=f"{name}-tp{tp}{'-sp' * sp}", marks=marks)


def one(x):
    """The value that all ranks have; fails if they differ."""
    x = x.wait() if hasattr(x, "wait") else x
    if not isinstance(x, LocalTensor):
        return x
    first, *others = x._local_tensors.values()
    assert all(torch.equal(first, other) for other in others), "the ranks differ"
    return first


def reference(make):
    model = make()
    value = loss(model, tokens())
    value.backward()
    return value.detach(), {name: p.grad for name, p in model.named_parameters()}


def spread_step(make, plan, rules=None):
    """Loss and whole gradients of the model spread as planned."""
    model = make()
    with plan_mesh(plan) as mesh, LocalTensorMode(plan.tp) as mode:
        parallelize(model, plan, mesh, rules=rules)
        value = loss(model, mode.rank_map(lambda _: tokens()))
        value.backward()
        gradients = {
            name: one(whole_parameter(model, name, p.grad)) for name, p in model.named_parameters()
        }
        return one(value.detach()), gradients


def distance(found, expected):
    """Largest difference of any gradient, in units of its largest value.

    A softmax does not see what all keys have in common: without rotations the gradient of their
    bias is zero but for rounding, and is held against the queries' instead.
    """
    assert found.keys() == expected.keys()

    def size(name):
        largest = expected[name].abs().max()
        if name.endswith("k_proj.bias"):
            queries = expected[name.replace("k_proj", "q_proj")].abs().max()
            largest = queries if largest < 1e-4 * queries else largest
        return largest

    return max(
        ((found[name] - expected[name]).abs().max() / size(name)).item() for name in expected
    )


@pytest.mark.parametrize(("name", "tp", "sp"), list(cases()))
def test_loss_and_gradients_equal_those_of_one_process(name, tp, sp):
    expected, expected_gradients = reference(MODELS[name])
    found, gradients = spread_step(MODELS[name], ParallelPlan(tp=tp, sp=sp))
    torch.testing.assert_close(found, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert distance(gradients, expected_gradients) < TOLERANCE


@pytest.mark.parametrize("name", ["our_llama", "llama", "gpt2"])
@pytest.mark.parametrize("sp", [False, True], ids=["tp", "sp"])
def test_embedding_by_vocabulary_and_head_by_column_on_request(name, sp):
    embedding = {"our_llama": "embed_tokens", "llama": "model.embed_tokens"}.get(name)
    rules = {embedding: "vocabulary", "lm_head": "column_gathered"}
    if name == "gpt2":  # tied
        rules = {"transformer.wte": "vocabulary", "lm_head": "column_gathered"}
    if name == "our_llama":
        del rules["lm_head"]
    expected, expected_gradients = reference(MODELS[name])
    found, gradients = spread_step(MODELS[name], ParallelPlan(tp=4, sp=sp), rules)
    torch.testing.assert_close(found, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert distance(gradients, expected_gradients) < TOLERANCE


def test_an_unlisted_family_is_spread_by_its_own_plan():
    def qwen2():
        return hugging_face("Qwen2")

    expected, expected_gradients = reference(qwen2)
    found, gradients = spread_step(qwen2, ParallelPlan(tp=4))
    torch.testing.assert_close(found, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert distance(gradients, expected_gradients) < TOLERANCE


def test_any_model_is_spread_by_its_users_rules():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8))
    x = torch.randn(3, 8)
    expected = model(x)
    plan = ParallelPlan(tp=2)
    with plan_mesh(plan) as mesh, LocalTensorMode(2) as mode:
        parallelize(model, plan, mesh, rules={"0": "column", "2": "row", "3": "whole"})
        found = one(model(mode.rank_map(lambda _: x.clone())))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_norms_on_own_heads_need_the_sum_of_their_gradients():
    _, expected = reference(MODELS["our_qwen3"])
    rules = {"layers.*.self_attn.q_norm": "whole"}
    model = MODELS["our_qwen3"]()
    with plan_mesh(ParallelPlan(tp=2)) as mesh, LocalTensorMode(2) as mode:
        parallelize(model, ParallelPlan(tp=2), mesh, rules=rules)
        loss(model, mode.rank_map(lambda _: tokens())).backward()
        name = "layers.0.self_attn.q_norm.weight"
        parts = dict(model.named_parameters())[name].grad.to_local()._local_tensors
    assert not torch.allclose(parts[0], expected[name], rtol=0.1)
    torch.testing.assert_close(parts[0] + parts[1], expected[name])


@pytest.mark.parametrize("name", ["our_qwen3", "gpt2", "phi3"])
def test_every_parameter_is_a_dtensor_and_gathers_to_its_own_values(name):
    model, plan = MODELS[name](), ParallelPlan(tp=4, sp=True)
    before = dict(model.named_parameters())
    with plan_mesh(plan) as mesh, LocalTensorMode(4):
        parallelize(model, plan, mesh)
        after = dict(model.named_parameters())
        assert after.keys() == before.keys()
        assert all(isinstance(p, DTensor) for p in after.values())
        whole = {name: one(whole_parameter(model, name, p.detach())) for name, p in after.items()}
        num_shared = sum(p.placements != (Replicate(),) for p in after.values())
    assert num_shared >= 8
    for key, value in whole.items():
        assert torch.equal(value, before[key]), key


def test_tied_parameters_stay_tied():
    plan = ParallelPlan(tp=2)
    with plan_mesh(plan) as mesh:
        model = parallelize(MODELS["our_qwen3"](), plan, mesh)
        tied = [m._parameters["weight"] for m in (model.embed_tokens, model.lm_head)]
        assert tied[0] is tied[1]
        keep_local_parameters(model)
        tied = [m._parameters["weight"] for m in (model.embed_tokens, model.lm_head)]
        assert tied[0] is tied[1]
        assert not isinstance(tied[0], DTensor)


def test_tied_parameters_with_different_rules_are_refused():
    plan = ParallelPlan(tp=2)
    with plan_mesh(plan) as mesh, pytest.raises(PlanError, match="lm_head are tied"):
        parallelize(MODELS["gpt2"](), plan, mesh, rules={"lm_head": "column_gathered"})


def test_tokens_that_tp_does_not_divide_are_refused_under_sp():
    plan = ParallelPlan(tp=2, sp=True)
    with plan_mesh(plan) as mesh:
        model = parallelize(own(), plan, mesh)
        with pytest.raises(PlanError, match="tp from 3, or a number of tokens that 2 divides"):
            model(tokens(15))


def test_a_mesh_of_another_size_is_refused():
    with plan_mesh(ParallelPlan(tp=4)) as mesh, pytest.raises(PlanError, match=r"tp=2, the mesh 4"):
        parallelize(own(), ParallelPlan(tp=2), mesh)


def test_a_model_is_spread_once():
    plan = ParallelPlan(tp=2)
    with plan_mesh(plan) as mesh:
        model = parallelize(own(), plan, mesh)
        with pytest.raises(PlanError, match="spread already"):
            parallelize(model, plan, mesh)


def test_a_model_on_the_meta_device_is_spread_without_memory():
    with torch.device("meta"):
        model = own()
    plan = ParallelPlan(tp=4, sp=True)
    with plan_mesh(plan) as mesh:
        parallelize(model, plan, mesh)
        local = model.layers[0].mlp.up_proj.weight
    assert local.device.type == "meta"
    assert local.shape == (24, 64)


def test_nothing_is_left_of_a_mesh_without_devices():
    for _ in range(2):
        with plan_mesh(ParallelPlan(dp=2, tp=4)) as mesh:
            assert mesh.mesh_dim_names == ("dp", "tp")
            assert mesh["tp"].size() == 4
        assert not torch.distributed.is_initialized()
    with plan_mesh(ParallelPlan()) as mesh:
        assert mesh.mesh_dim_names == ("tp",)
